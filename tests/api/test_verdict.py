"""Policies against specs."""

from typing import Any

import pytest

from api.capturepolicy import CapturePolicy
from api.packetcapture import PacketCaptureSpec
from api.verdict import denial, judge, refused


def policy(name: str = "p", **rules: Any) -> CapturePolicy:
    return CapturePolicy.model_validate({"metadata": {"name": name}, "spec": rules})


def spec(**fields: Any) -> PacketCaptureSpec:
    return PacketCaptureSpec.model_validate({"selector": "app == 'x'"} | fields)


HTTP = [{"protocol": "TCP", "ports": [80]}]

TOO_WIDE = "the selector takes pods without any label too: select by a label that they have"

CASES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({}, {"selector": "all()"}, TOO_WIDE),
    ({"selectors": {"allowEmpty": True}}, {"selector": "all()"}, None),
    ({}, {"selector": "zz != 'x'"}, TOO_WIDE),
    ({}, {"selector": "has(a) || !has(a)"}, TOO_WIDE),
    ({}, {"selector": "a not in {'x'}"}, TOO_WIDE),
    ({}, {"selector": None, "podSelector": {}}, TOO_WIDE),
    (
        {},
        {"selector": None, "podSelector": {"matchExpressions": [{"key": "zz", "operator": "DoesNotExist"}]}},
        TOO_WIDE,
    ),
    ({}, {"selector": "app == 'x' && zz != 'x'"}, None),
    ({"filters": {"required": True}}, {}, "filters are required"),
    ({"filters": {"required": True}}, {"filters": HTTP}, None),
    ({"filters": {"protocols": ["TCP"]}}, {}, "filters are required"),
    ({"filters": {"protocols": ["TCP"]}}, {"filters": [{}]}, "each filter must name a protocol: TCP"),
    ({"filters": {"protocols": ["TCP"]}}, {"filters": [{"protocol": 6}]}, None),
    ({"filters": {"protocols": ["TCP"]}}, {"filters": [{"protocol": "UDP"}]}, "protocol UDP is not allowed: TCP are"),
    (
        {"filters": {"protocols": ["TCP"]}},
        {"filters": [*HTTP, {"protocol": 17}]},
        "protocol 17 is not allowed: TCP are",
    ),
    ({"filters": {"allowedPorts": [80]}}, {"filters": HTTP}, None),
    ({"filters": {"allowedPorts": [80]}}, {"filters": [{"ports": [81]}]}, "port 81 is not allowed: 80 are"),
    ({"filters": {"allowedPorts": [80]}}, {"filters": [{"protocol": "TCP"}]}, "each filter must name ports out of 80"),
    ({"filters": {"allowedPorts": ["80:90", "91:99"]}}, {"filters": [{"ports": ["85:95"]}]}, None),
    (
        {"filters": {"allowedPorts": ["80:90", "92:99"]}},
        {"filters": [{"ports": ["85:95"]}]},
        "port 85:95 is not allowed: 80:90, 92:99 are",
    ),
    ({"filters": {"deniedPorts": [22]}}, {"filters": HTTP}, None),
    ({"filters": {"deniedPorts": [22]}}, {"filters": [{"ports": ["20:30"]}]}, "port 22 is denied"),
    (
        {"filters": {"deniedPorts": [22]}},
        {"filters": [{"protocol": "TCP"}]},
        "a filter without ports could take those that are denied (22): name the ports",
    ),
    ({"filters": {"deniedPorts": [22]}}, {"filters": [{"protocol": "ICMP"}]}, None),
    ({"filters": {"deniedPorts": [22]}}, {}, "filters are required"),
    ({}, {"interfaces": ["eth0", "net1"]}, None),
    (
        {},
        {"interfaces": ["eth0", "lo"]},
        "interface lo is not allowed: the policy has to list it in interfaces.allowed",
    ),
    ({"interfaces": {"allowed": ["eth0", "lo"]}}, {"interfaces": ["lo"]}, None),
    ({"interfaces": {"allowed": ["eth0", "net1"]}}, {"interfaces": ["net1"]}, None),
    ({"interfaces": {"allowed": ["eth0"]}}, {"interfaces": ["eth0", "lo"]}, "interface lo is not allowed: eth0 are"),
    ({"interfaces": {"allowed": ["eth0"]}}, {}, "interfaces must be named, out of eth0"),
    ({"limits": {"maxFiles": 1}}, {}, "rotation.maxFiles is more than 1"),
    ({"limits": {"maxFileSize": "1M"}}, {}, "rotation.maxFileSize is more than 1000000 bytes"),
    ({"limits": {"maxSnapLength": 128}}, {}, "snapLength is more than 128"),
    ({"limits": {"maxSnapLength": 128}}, {"snapLength": 128}, None),
    (
        {"limits": {"maxDuration": "10m"}},
        {"startTime": "2026-12-01T10:00:00Z", "endTime": "2026-12-01T10:15:00Z"},
        "from startTime to endTime is more than 10m0s",
    ),
    ({"limits": {"maxDuration": "10m"}}, {"startTime": "2026-12-01T10:00:00Z"}, None),
]


@pytest.mark.parametrize(("rules", "fields", "refusal"), CASES)
def test_a_policy_allows_or_names_the_rule_that_refused(
    rules: dict[str, Any], fields: dict[str, Any], refusal: str | None
) -> None:
    assert refused(spec(**fields), policy(**rules)) == refusal


def test_one_policy_that_allows_all_is_enough_and_the_first_by_name_is_taken() -> None:
    verdict = judge(spec(), [policy("z"), policy("b"), policy("a", filters={"required": True})])
    assert verdict.policy is not None
    assert verdict.policy.metadata.name == "b"


def test_policies_are_not_added_up() -> None:
    web = policy("web", filters={"allowedPorts": [80]})
    dns = policy("dns", filters={"allowedPorts": [53]})
    verdict = judge(spec(filters=[{"ports": [80]}, {"ports": [53]}]), [web, dns])
    assert verdict.policy is None
    assert denial(verdict, user="u", namespace="dev", existing=["web", "dns"]) == (
        "policy dns: port 80 is not allowed: 53 are; policy web: port 53 is not allowed: 80 are"
    )


def test_without_a_usable_policy_the_denial_says_which_exist() -> None:
    assert denial(judge(spec(), []), user="u", namespace="dev", existing=["b", "a"]) == (
        "user u may use no CapturePolicy in namespace dev (there are: a, b): "
        "ask for a RoleBinding to a role with verb use on capturepolicies"
    )
    assert denial(judge(spec(), []), user="u", namespace="dev", existing=[]) == (
        "no CapturePolicy exists: a cluster administrator has to create one"
    )
