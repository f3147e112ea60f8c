"""What a policy allows, rule by rule: a specification to be read from top to bottom."""

from datetime import UTC, datetime
from typing import Any

import pytest

from api.capturepolicy import CapturePolicy
from api.packetcapture import PacketCaptureSpec
from api.verdict import Circumstances, denial, judge, refused

Fields = dict[str, Any]
Case = tuple[Fields, Fields, str | None]
"""The policy's rules, the capture's spec, and why that is refused; None where it is allowed."""

NOW = datetime(2030, 1, 1, tzinfo=UTC)
HERE = Circumstances(now=NOW, namespace_labels={"team": "web", "kubernetes.io/metadata.name": "dev"})


def policy(name: str = "p", **rules: Any) -> CapturePolicy:
    return CapturePolicy.model_validate({"metadata": {"name": name}, "spec": rules})


def spec(**fields: Any) -> PacketCaptureSpec:
    return PacketCaptureSpec.model_validate({"selector": "app == 'x'"} | fields)


def selector(text: str) -> Fields:
    return {"selector": text}


def labels(*expressions: Fields, **match: str) -> Fields:
    """A pod selector in Kubernetes' own form."""
    return {"selector": None, "podSelector": {"matchLabels": match, "matchExpressions": list(expressions)}}


def filters(*entries: Fields) -> Fields:
    return {"filters": list(entries)}


def whole(*protocols: str | int) -> list[Fields]:
    """Entries of filters that each take all of a protocol."""
    return [{"protocol": protocol} for protocol in protocols]


def message(protocol: str | int, kind: str | int) -> Fields:
    """An entry of filters for one kind of ICMP messages."""
    return {"protocol": protocol, "icmp": {"type": kind}}


def expression(key: str, operator: str, *values: str) -> Fields:
    return {"key": key, "operator": operator, "values": list(values)}


def times(start: str | None = None, end: str | None = None) -> Fields:
    return {"startTime": start, "endTime": end}


TOO_WIDE = "the selector takes pods without any label too: select by a label that they have"
WIDE: Fields = {"selectors": {"allowEmpty": True}}

EMPTY_SELECTORS: list[Case] = [
    ({}, {}, None),
    ({}, selector(""), TOO_WIDE),
    ({}, selector("all()"), TOO_WIDE),
    ({}, selector("global()"), TOO_WIDE),
    ({}, selector("app != 'x'"), TOO_WIDE),
    ({}, selector("!has(app)"), TOO_WIDE),
    ({}, selector("!(app == 'x')"), TOO_WIDE),
    ({}, selector("has(a) || !has(a)"), TOO_WIDE),
    ({}, selector("app not in {'x'}"), TOO_WIDE),
    ({}, selector("app not in {}"), TOO_WIDE),
    ({}, selector("app == 'x' || tier != 'y'"), TOO_WIDE),
    ({}, selector("app == 'x' && tier != 'y'"), None),
    ({}, selector("has(app)"), None),
    ({}, selector("app contains ''"), None),
    ({}, selector("app in {}"), None),
    ({}, labels(), TOO_WIDE),
    ({}, labels(expression("app", "DoesNotExist")), TOO_WIDE),
    ({}, labels(expression("app", "NotIn", "x")), TOO_WIDE),
    ({}, labels(expression("app", "Exists")), None),
    ({}, labels(expression("tier", "NotIn", "y"), app="x"), None),
    (WIDE, selector("all()"), None),
    (WIDE, selector("app != 'x'"), None),
    (WIDE, labels(), None),
]


def unpinned(key: str) -> str:
    return f"the selector must list the values of label {key}, with == or in: it could match pods with others"


PINNED: Fields = {"selectors": {"requiredKeys": ["app"]}}
PINNED_ALONE: Fields = {"selectors": {"requiredKeys": ["app"], "allowEmpty": True}}
TWO_PINNED: Fields = {"selectors": {"requiredKeys": ["app", "k8s.io/part-of"]}}

REQUIRED_KEYS: list[Case] = [
    (PINNED, selector("app == 'x'"), None),
    (PINNED, selector("app in {'x', 'y'}"), None),
    (PINNED, selector("app in {'x', 'y'} && app != 'x'"), None),
    (PINNED, selector("app == 'x' || app == 'y'"), None),
    (PINNED, selector("app == 'x' && tier == 'web'"), None),
    (PINNED, selector("tier == 'web' && (app == 'x' || app == 'y')"), None),
    (PINNED, selector("(tier == 'a' && app == 'x') || (tier == 'b' && app == 'y')"), None),
    (PINNED, selector("!(app != 'x')"), None),
    (PINNED, selector("!(app not in {'x', 'y'})"), None),
    (PINNED, selector("!(app != 'x' || tier == 'web')"), None),
    (PINNED, selector("!!(app == 'x')"), None),
    (PINNED, selector("app starts with 'x' && app in {'xa', 'y'}"), None),
    (PINNED, labels(app="x"), None),
    (PINNED, labels(expression("app", "In", "x", "y")), None),
    (PINNED, labels(expression("tier", "Exists"), app="x"), None),
    (TWO_PINNED, selector("app == 'x' && k8s.io/part-of == 'shop'"), None),
    (PINNED, selector("tier == 'web'"), unpinned("app")),
    (PINNED, selector("has(app)"), unpinned("app")),
    (PINNED, selector("has(app) && app != 'x'"), unpinned("app")),
    (PINNED, selector("app contains 'x'"), unpinned("app")),
    (PINNED, selector("app starts with 'x'"), unpinned("app")),
    (PINNED, selector("app ends with 'x'"), unpinned("app")),
    (PINNED, selector("app == 'x' || tier == 'web'"), unpinned("app")),
    (PINNED, selector("app == 'x' || has(app)"), unpinned("app")),
    (PINNED, selector("!(app == 'x') && has(tier)"), unpinned("app")),
    (PINNED, selector("!(app == 'x' && tier == 'web') && has(tier)"), unpinned("app")),
    (PINNED, selector("App == 'x'"), unpinned("app")),
    (PINNED, labels(tier="web"), unpinned("app")),
    (PINNED, labels(expression("app", "Exists")), unpinned("app")),
    (PINNED, labels(expression("app", "NotIn", "x"), tier="web"), unpinned("app")),
    (TWO_PINNED, selector("app == 'x'"), unpinned("k8s.io/part-of")),
    (PINNED_ALONE, selector("all()"), unpinned("app")),
    (PINNED_ALONE, selector("!has(app)"), unpinned("app")),
    # In doubt it is refused: that app can't be both is not seen through.
    (PINNED, selector("(tier == 'a' && tier == 'b') || app == 'x'"), unpinned("app")),
]


def possible(label: str) -> str:
    return f"the selector could match pods with {label}, which is forbidden: rule that out in it"


NO_VAULT: Fields = {"selectors": {"forbidden": [{"key": "tier", "values": ["vault", "keys"]}]}}
NO_EMPTY_TIER: Fields = {"selectors": {"forbidden": [{"key": "tier", "values": [""]}]}}

FORBIDDEN_LABELS: list[Case] = [
    (NO_VAULT, selector("tier == 'web'"), None),
    (NO_VAULT, selector("app == 'x' && tier != 'vault' && tier != 'keys'"), None),
    (NO_VAULT, selector("app == 'x' && tier not in {'keys', 'vault'}"), None),
    (NO_VAULT, selector("app == 'x' && !has(tier)"), None),
    (NO_VAULT, selector("app == 'x' && !(tier in {'keys', 'vault'})"), None),
    (NO_VAULT, selector("tier in {'web', 'vault'} && tier != 'vault'"), None),
    (NO_VAULT, labels(tier="web"), None),
    (NO_VAULT, labels(expression("tier", "NotIn", "vault", "keys"), app="x"), None),
    (NO_VAULT, labels(expression("tier", "DoesNotExist"), app="x"), None),
    (NO_EMPTY_TIER, selector("tier == 'web'"), None),
    (NO_VAULT, {}, possible("tier=vault")),
    (NO_VAULT, selector("tier == 'vault'"), possible("tier=vault")),
    (NO_VAULT, selector("tier in {'web', 'keys'}"), possible("tier=keys")),
    (NO_VAULT, selector("app == 'x' && tier != 'vault'"), possible("tier=keys")),
    (NO_VAULT, selector("has(tier)"), possible("tier=vault")),
    (NO_VAULT, selector("tier == 'web' || app == 'x'"), possible("tier=vault")),
    (NO_VAULT, selector("tier starts with 'w'"), possible("tier=vault")),
    (NO_VAULT, labels(app="x"), possible("tier=vault")),
    (NO_VAULT, labels(expression("tier", "Exists")), possible("tier=vault")),
    (NO_EMPTY_TIER, selector("has(tier)"), possible("tier=")),
]

HTTP: Fields = {"protocol": "TCP", "ports": [80]}
TCP_ONLY: Fields = {"filters": {"protocols": ["TCP"]}}
PING_ONLY: Fields = {"filters": {"protocols": ["ICMP", "ICMPv6"]}}

PROTOCOLS: list[Case] = [
    ({}, filters({}), None),
    ({}, filters({"protocol": 47}), None),
    ({"filters": {"required": True}}, {}, "filters are required"),
    ({"filters": {"required": True}}, filters(HTTP), None),
    ({"filters": {"required": True}}, filters({"ports": [80]}), None),
    ({"filters": {"required": True}}, filters({"protocol": 47}), None),
    ({"filters": {"required": True}}, filters({}), "each filter must name a protocol or ports"),
    ({"filters": {"required": True}}, filters(HTTP, {}), "each filter must name a protocol or ports"),
    (TCP_ONLY, {}, "filters are required"),
    (TCP_ONLY, filters({}), "each filter must name a protocol: TCP"),
    (TCP_ONLY, filters({"ports": [80]}), "each filter must name a protocol: TCP"),
    (TCP_ONLY, filters(HTTP), None),
    (TCP_ONLY, filters({"protocol": "tcp"}), None),
    (TCP_ONLY, filters({"protocol": 6}), None),
    (TCP_ONLY, filters({"protocol": "6"}), None),
    (TCP_ONLY, filters({"protocol": "UDP"}), "protocol UDP is not allowed: TCP are"),
    (TCP_ONLY, filters(HTTP, {"protocol": 17}), "protocol 17 is not allowed: TCP are"),
    (TCP_ONLY, filters({"protocol": 255}), "protocol 255 is not allowed: TCP are"),
    (PING_ONLY, filters({"protocol": "ICMP"}), None),
    (PING_ONLY, filters({"protocol": 58}), None),
    (PING_ONLY, filters({"protocol": "ICMP"}, {"protocol": "ICMPv6"}), None),
    (PING_ONLY, filters(HTTP), "protocol TCP is not allowed: ICMP, ICMPv6 are"),
    ({"filters": {"protocols": []}}, filters(HTTP), "protocol TCP is not allowed: none are"),
]

WEB_PORTS: Fields = {"filters": {"allowedPorts": [80]}}
RANGES: Fields = {"filters": {"allowedPorts": ["80:90", "91:99"]}}
GAP: Fields = {"filters": {"allowedPorts": ["92:99", "80:90"]}}
OVERLAP: Fields = {"filters": {"allowedPorts": ["80:90", "85:99", 82]}}

ALLOWED_PORTS: list[Case] = [
    (WEB_PORTS, {}, "filters are required"),
    (WEB_PORTS, filters({"protocol": "TCP"}), "each filter must name ports out of 80"),
    (WEB_PORTS, filters({"protocol": "ICMP"}), "each filter must name ports out of 80"),
    (WEB_PORTS, filters({}), "each filter must name ports out of 80"),
    (WEB_PORTS, filters(HTTP), None),
    (WEB_PORTS, filters({"ports": ["80"]}), None),
    (WEB_PORTS, filters({"ports": ["80:80"]}), None),
    (WEB_PORTS, filters({"ports": [81]}), "port 81 is not allowed: 80 are"),
    (WEB_PORTS, filters({"ports": [80, 8080]}), "port 8080 is not allowed: 80 are"),
    (WEB_PORTS, filters(HTTP, {"ports": [81]}), "port 81 is not allowed: 80 are"),
    (WEB_PORTS, filters({"ports": ["80:81"]}), "port 80:81 is not allowed: 80 are"),
    (WEB_PORTS, filters({"ports": ["1:65535"]}), "port 1:65535 is not allowed: 80 are"),
    (RANGES, filters({"ports": ["85:95"]}), None),
    (RANGES, filters({"ports": ["80:99"]}), None),
    (RANGES, filters({"ports": ["79:99"]}), "port 79:99 is not allowed: 80:90, 91:99 are"),
    (RANGES, filters({"ports": ["80:100"]}), "port 80:100 is not allowed: 80:90, 91:99 are"),
    (GAP, filters({"ports": ["85:95"]}), "port 85:95 is not allowed: 92:99, 80:90 are"),
    (GAP, filters({"ports": [91]}), "port 91 is not allowed: 92:99, 80:90 are"),
    (GAP, filters({"ports": ["80:90", "92:99"]}), None),
    (OVERLAP, filters({"ports": ["80:99"]}), None),
    ({"filters": {"allowedPorts": []}}, filters(HTTP), "port 80 is not allowed: none are"),
]

NO_SSH: Fields = {"filters": {"deniedPorts": [22]}}
NO_LOW: Fields = {"filters": {"deniedPorts": ["1:1023", 3306]}}
NEEDS_PORTS = "each filter must name ports out of 80"
QUOTED = "since errors quote packets, also of ports that are denied (22)"
UNNAMED = "a filter without ports could take those that are denied (22): name the ports"

DENIED_PORTS: list[Case] = [
    (NO_SSH, {}, "filters are required"),
    (NO_SSH, filters(HTTP), None),
    (NO_SSH, filters({"ports": [22]}), "port 22 is denied"),
    (NO_SSH, filters({"protocol": "UDP", "ports": [22]}), "port 22 is denied"),
    (NO_SSH, filters(HTTP, {"ports": [22]}), "port 22 is denied"),
    (NO_SSH, filters({"ports": [80, 22]}), "port 22 is denied"),
    (NO_SSH, filters({"ports": ["20:30"]}), "port 22 is denied"),
    (NO_SSH, filters({"ports": ["1:65535"]}), "port 22 is denied"),
    (NO_SSH, filters({"ports": ["1:21", "23:65535"]}), None),
    (NO_LOW, filters({"ports": ["1000:2000"]}), "port 1000:1023 is denied"),
    (NO_LOW, filters({"ports": ["3000:4000"]}), "port 3306 is denied"),
    (NO_LOW, filters({"ports": ["1024:3305", 8080]}), None),
    (NO_SSH, filters({}), UNNAMED),
    (NO_SSH, filters({"protocol": "TCP"}), UNNAMED),
    (NO_SSH, filters({"protocol": 17}), UNNAMED),
    (NO_SSH, filters({"protocol": "SCTP"}), UNNAMED),
    (NO_SSH, filters(HTTP, {"protocol": "TCP"}), UNNAMED),
    (NO_SSH, filters({"protocol": 89}), None),
    # What a router could not deliver, and redirects, come back within the ICMP message.
    *(
        (NO_SSH, filters(entry), f"protocol {entry['protocol']} needs an icmp.type that is no error, {QUOTED}")
        for entry in (
            *whole("ICMP", "ICMPv6", 1, 58),
            *(message("ICMP", kind) for kind in ("destination-unreachable", "redirect", "time-exceeded", 3, 4, 5, 11)),
            *(message("ICMP", kind) for kind in ("parameter-problem", 12, 31, 40, 253)),
            *(message("ICMPv6", kind) for kind in ("destination-unreachable", "packet-too-big", "redirect", 0, 127)),
            message(1, 3),
            message(58, 137),
        )
    ),
    *(
        (NO_SSH, filters(entry), None)
        for entry in (
            *(message("ICMP", kind) for kind in ("echo-request", "echo-reply", "router-advertisement", 0, 8, 13)),
            *(message("ICMPv6", kind) for kind in ("echo-request", "neighbor-solicitation", 128, 136, 138, 255)),
            message(1, 8),
            message(58, "echo-reply"),
        )
    ),
    (
        NO_SSH,
        filters(message("ICMP", 8), message("ICMP", 3)),
        f"protocol ICMP needs an icmp.type that is no error, {QUOTED}",
    ),
    # What has ports that can't be named, what tunnels, and IPv6 packets by an extension header's number.
    *(
        (
            NO_SSH,
            filters({"protocol": protocol}),
            f"protocol {protocol} is not allowed, since it may hold ports that are denied (22)",
        )
        for protocol in ("UDPLite", 33, 4, 41, 47, 103, 43, 44, 60)
    ),
    ({"filters": {"allowedPorts": ["1:1000"], "deniedPorts": [22]}}, filters(HTTP), None),
    ({"filters": {"allowedPorts": ["1:1000"], "deniedPorts": [22]}}, filters({"ports": [22]}), "port 22 is denied"),
    ({"filters": {"protocols": ["ICMP"], "deniedPorts": [22]}}, filters(message("ICMP", 8)), None),
    ({"filters": {"protocols": ["ICMP"], "allowedPorts": [80]}}, filters(message("ICMP", 8)), NEEDS_PORTS),
]

LOOPBACK = "interface lo is not allowed: the policy has to list it in interfaces.allowed"
ETH0: Fields = {"interfaces": {"allowed": ["eth0"]}}

INTERFACES: list[Case] = [
    ({}, {"interfaces": ["eth0", "net1"]}, None),
    ({}, {"interfaces": ["lo"]}, LOOPBACK),
    ({}, {"interfaces": ["eth0", "lo"]}, LOOPBACK),
    ({"interfaces": {"allowed": ["eth0", "lo"]}}, {"interfaces": ["lo"]}, None),
    ({"interfaces": {"allowed": ["eth0", "net1"]}}, {"interfaces": ["net1"]}, None),
    (ETH0, {"interfaces": ["eth0"]}, None),
    (ETH0, {"interfaces": ["eth0", "lo"]}, "interface lo is not allowed: eth0 are"),
    (ETH0, {"interfaces": ["eth1"]}, "interface eth1 is not allowed: eth0 are"),
    (ETH0, {}, "interfaces must be named, out of eth0"),
]

TEN_MINUTES: Fields = {"limits": {"maxDuration": "10m"}}
WITH_END: Fields = {"limits": {"maxDuration": "1h", "requireEndTime": True}}
SOON: Fields = {"limits": {"maxDuration": "10m", "maxStartDelay": "1h"}}
DAY_KEPT: Fields = {"limits": {"maxTTL": "1d"}}

TIMES: list[Case] = [
    (TEN_MINUTES, times(), None),
    (TEN_MINUTES, times(end="2030-01-01T00:10:00Z"), None),
    (TEN_MINUTES, times(end="2030-01-01T00:10:01Z"), "endTime is further ahead than 10m0s"),
    (TEN_MINUTES, times(end="2029-12-31T00:00:00Z"), None),
    (TEN_MINUTES, times("2030-01-02T10:00:00Z"), None),
    (TEN_MINUTES, times("2030-01-02T10:00:00Z", "2030-01-02T10:10:00Z"), None),
    (
        TEN_MINUTES,
        times("2030-01-02T10:00:00Z", "2030-01-02T10:10:01Z"),
        "from startTime to endTime is more than 10m0s",
    ),
    (TEN_MINUTES, times("2029-12-31T23:55:00Z", "2030-01-01T00:05:00Z"), None),
    (TEN_MINUTES, times("2030-01-02T12:00:00+02:00", "2030-01-02T10:10:00Z"), None),
    (WITH_END, times(), "endTime is required"),
    (WITH_END, times("2030-01-01T00:30:00Z"), "endTime is required"),
    (WITH_END, times(end="2030-01-01T00:30:00Z"), None),
    (SOON, times("2030-01-01T01:00:00Z"), None),
    (SOON, times("2030-01-01T01:00:01Z"), "startTime is further ahead than 1h0m0s"),
    (SOON, times("2020-01-01T00:00:00Z"), None),
    ({}, times("2030-01-08T00:00:00Z"), None),
    ({}, times("2030-01-08T00:00:01Z"), "startTime is further ahead than 168h0m0s"),
    (DAY_KEPT, {"ttlSecondsAfterFinished": 86400}, None),
    (DAY_KEPT, {"ttlSecondsAfterFinished": 0}, None),
    (DAY_KEPT, {"ttlSecondsAfterFinished": 86401}, "ttlSecondsAfterFinished is more than 86400"),
    (DAY_KEPT, {}, "ttlSecondsAfterFinished is required, at most 86400"),
    ({}, {"ttlSecondsAfterFinished": 2**31 - 1}, None),
]

ONE_FILE: Fields = {"limits": {"maxFiles": 1}}
ONE_MEGABYTE: Fields = {"limits": {"maxFileSize": "1M"}}
HEADERS: Fields = {"limits": {"maxSnapLength": 128}}

SIZES: list[Case] = [
    (ONE_FILE, {}, "rotation.maxFiles is more than 1"),
    (ONE_FILE, {"rotation": {"maxFiles": 1}}, None),
    (ONE_MEGABYTE, {}, "rotation.maxFileSize is more than 1000000 bytes"),
    (ONE_MEGABYTE, {"rotation": {"maxFileSize": "1M"}}, None),
    (ONE_MEGABYTE, {"rotation": {"maxFileSize": "1Mi"}}, "rotation.maxFileSize is more than 1000000 bytes"),
    (ONE_MEGABYTE, {"rotation": {"maxFileSize": 1000001}}, "rotation.maxFileSize is more than 1000000 bytes"),
    (HEADERS, {}, "snapLength is more than 128"),
    (HEADERS, {"snapLength": 128}, None),
    (HEADERS, {"snapLength": 129}, "snapLength is more than 128"),
    ({}, {"rotation": {"maxFiles": 11}}, "rotation.maxFiles is more than 10"),
    ({}, {"rotation": {"maxFileSize": "101M"}}, "rotation.maxFileSize is more than 100000000 bytes"),
    ({}, {"suspend": True}, None),
    ({}, {"rotation": {"maxFileAge": "1s"}}, None),
]

ELSEWHERE = "its namespaceSelector does not select this namespace"


def namespaces(*expressions: Fields, **match: str) -> Fields:
    return {"namespaceSelector": {"matchLabels": match, "matchExpressions": list(expressions)}}


NAMESPACES: list[Case] = [
    (namespaces(), {}, None),
    (namespaces(team="web"), {}, None),
    (namespaces(team="db"), {}, ELSEWHERE),
    (namespaces(team="web", stage="test"), {}, ELSEWHERE),
    (namespaces(expression("kubernetes.io/metadata.name", "In", "dev", "test")), {}, None),
    (namespaces(expression("kubernetes.io/metadata.name", "NotIn", "dev")), {}, ELSEWHERE),
    (namespaces(expression("pci", "DoesNotExist")), {}, None),
    (namespaces(expression("pci", "Exists")), {}, ELSEWHERE),
]

# The first rule that refuses is named: namespace, selector, filters, interfaces, times, sizes.
ORDER: list[Case] = [
    (namespaces(team="db") | NO_SSH, selector("all()"), ELSEWHERE),
    (PINNED | NO_SSH, selector("all()"), TOO_WIDE),
    (PINNED | NO_SSH, selector("has(tier)") | filters({"ports": [22]}), unpinned("app")),
    (NO_SSH | ETH0, filters({"ports": [22]}), "port 22 is denied"),
    (ETH0 | WITH_END, {}, "interfaces must be named, out of eth0"),
    ({"limits": {"requireEndTime": True, "maxFiles": 1}}, {}, "endTime is required"),
]

TABLE = {
    "empty selectors": EMPTY_SELECTORS,
    "required keys": REQUIRED_KEYS,
    "forbidden labels": FORBIDDEN_LABELS,
    "protocols": PROTOCOLS,
    "allowed ports": ALLOWED_PORTS,
    "denied ports": DENIED_PORTS,
    "interfaces": INTERFACES,
    "times": TIMES,
    "sizes": SIZES,
    "namespaces": NAMESPACES,
    "order": ORDER,
}


@pytest.mark.parametrize(
    ("rules", "fields", "refusal"),
    [pytest.param(*case, id=f"{name} {number}") for name, cases in TABLE.items() for number, case in enumerate(cases)],
)
def test_a_policy_allows_or_names_the_rule_that_refused(rules: Fields, fields: Fields, refusal: str | None) -> None:
    assert refused(spec(**fields), policy(**rules), HERE) == refusal


def test_the_time_of_a_capture_without_start_counts_from_its_creation() -> None:
    given = spec(**times(end="2030-01-01T00:05:00Z"))
    older = Circumstances(now=NOW, created=datetime(2029, 12, 31, 23, 50, tzinfo=UTC))
    assert refused(given, policy(**TEN_MINUTES), HERE) is None
    assert refused(given, policy(**TEN_MINUTES), older) == "endTime is further ahead than 10m0s"


def test_a_namespace_of_which_no_label_is_known_is_selected_by_none() -> None:
    assert refused(spec(), policy(**namespaces()), Circumstances(now=NOW)) == ELSEWHERE


def test_one_policy_that_allows_all_is_enough_and_the_first_by_name_is_taken() -> None:
    verdict = judge(spec(), [policy("z"), policy("b"), policy("a", filters={"required": True})], HERE)
    assert verdict.policy is not None
    assert verdict.policy.metadata.name == "b"


def test_policies_are_not_added_up() -> None:
    web = policy("web", filters={"allowedPorts": [80]})
    dns = policy("dns", filters={"allowedPorts": [53]})
    verdict = judge(spec(filters=[{"ports": [80]}, {"ports": [53]}]), [web, dns], HERE)
    assert verdict.policy is None
    assert denial(verdict, user="u", namespace="dev", existing=["web", "dns"]) == (
        "policy dns: port 80 is not allowed: 53 are; policy web: port 53 is not allowed: 80 are"
    )


def test_a_denial_names_each_usable_policy_and_its_first_rule_that_refused() -> None:
    verdict = judge(spec(**filters({"ports": [22]})), [policy("web", **WITH_END), policy("baseline", **NO_SSH)], HERE)
    assert denial(verdict, user="u", namespace="dev", existing=["web", "baseline", "other"]) == (
        "policy baseline: port 22 is denied; policy web: endTime is required"
    )


def test_without_a_usable_policy_the_denial_says_which_exist() -> None:
    assert denial(judge(spec(), [], HERE), user="u", namespace="dev", existing=["b", "a"]) == (
        "user u may use no CapturePolicy in namespace dev (there are: a, b): "
        "ask for a RoleBinding to a role with verb use on capturepolicies"
    )
    assert denial(judge(spec(), [], HERE), user="u", namespace="dev", existing=[]) == (
        "no CapturePolicy exists: a cluster administrator has to create one"
    )
