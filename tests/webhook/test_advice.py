"""Warnings about pods: only to those who may see them, never in the way."""

from typing import Any

import pytest

from api.packetcapture import PacketCaptureSpec
from kube.client import PODS
from tests.webhook.cases import ALICE
from tests.webhook.standin import KubeApiserver
from webhook.access import Access
from webhook.advice import Advice, Workload, advise

NO_POD = "the selector matches no pod of namespace dev now"
WEB = Workload({"app": "web"}, frozenset({("TCP", 80), ("TCP", 443), ("UDP", 443)}))
DNS = Workload({"app": "dns"}, frozenset({("UDP", 53)}))
BARE = Workload({"app": "bare"}, frozenset())


def undeclared(ports: str) -> str:
    return f"no container of the selected pods declares port {ports}: is that the port meant?"


def spec(app: str = "web", *filters: dict[str, Any]) -> PacketCaptureSpec:
    return PacketCaptureSpec.model_validate({"selector": f"app == '{app}'", "filters": list(filters)})


@pytest.mark.parametrize(
    ("given", "warnings"),
    [
        (spec(), []),
        (spec("other"), [NO_POD]),
        (spec("other", {"ports": [1]}), [NO_POD]),
        (spec("web", {"ports": [80]}), []),
        (spec("web", {"protocol": "TCP", "ports": [80, "440:450"]}), []),
        (spec("web", {"protocol": 17, "ports": [443]}), []),
        (spec("web", {"protocol": "UDP", "ports": [80]}), [undeclared("80")]),
        (spec("web", {"ports": [53]}), [undeclared("53")]),
        (spec("web", {"ports": ["81:90", 80, 8080]}), [undeclared("81:90, 8080")]),
        (spec("web", {"ports": [1, 2]}, {"ports": [3, 4]}), [undeclared("1, 2, 3, …")]),
        (spec("web", {"protocol": "ICMP"}), []),
        (spec("bare", {"ports": [80]}), [undeclared("80")]),
    ],
)
def test_what_is_probably_not_meant_is_said(given: PacketCaptureSpec, warnings: list[str]) -> None:
    assert advise(given, [WEB, DNS, BARE], namespace="dev") == warnings


def test_in_a_namespace_without_pods_none_is_matched() -> None:
    assert advise(spec(), [], namespace="dev") == [NO_POD]


def test_each_is_short_enough_for_kubectl() -> None:
    widest = {"ports": ["60001:60002", "60003:60004", "60005:60006", "60007:60008"]}
    for given in (spec("other"), spec("web", widest)):
        (warning,) = advise(given, [WEB], namespace="n" * 63)
        assert len(warning) < 120


def kube_apiserver(**settings: Any) -> KubeApiserver:
    api = KubeApiserver(**settings)
    api.add(PODS, "web", labels={"app": "web"}, spec={"containers": [{"ports": [{"containerPort": 80}]}]})
    return api


async def advice(api: KubeApiserver, given: PacketCaptureSpec, *, times: int = 1) -> list[str]:
    source = Advice(api.client, Access(api.client))
    for _ in range(times):
        said = await source.on(given, user=ALICE, namespace="dev")
    return said


async def test_pods_are_looked_at_once_for_a_burst() -> None:
    api = kube_apiserver()
    assert await advice(api, spec("web", {"ports": [80]}), times=20) == []
    assert await advice(api, spec("db")) == [NO_POD]
    assert api.lists == [PODS, PODS]


async def test_ports_of_init_containers_count_and_their_protocol_is_tcp_if_not_said() -> None:
    api = KubeApiserver()
    containers = {
        "containers": [{"name": "no ports"}],
        "initContainers": [{"ports": [{"containerPort": 15090}, {"containerPort": 53, "protocol": "UDP"}]}],
    }
    api.add(PODS, "web", labels={"app": "web"}, spec=containers)
    assert await advice(api, spec("web", {"protocol": "TCP", "ports": [15090]}, {"ports": [53]})) == []
    assert await advice(api, spec("web", {"protocol": "UDP", "ports": [15090]})) == [undeclared("15090")]


async def test_who_may_not_list_pods_is_told_nothing_of_them_and_nobody_lists_them() -> None:
    asked = []

    def may(user: str, attributes: dict[str, Any]) -> bool:
        asked.append((user, attributes))
        return False

    api = kube_apiserver(may=may)
    assert await advice(api, spec("db")) == []
    assert asked == [("alice", {"verb": "list", "group": "", "resource": "pods", "namespace": "dev"})]
    assert api.lists == []


async def test_of_more_pods_than_are_looked_at_nothing_is_said() -> None:
    api = KubeApiserver()
    for number in range(200):
        api.add(PODS, f"p{number}", labels={"app": "web"}, spec={})
    assert await advice(api, spec("db"), times=5) == []
    assert api.lists == [PODS]
    api.objects[PODS].pop()
    assert await advice(api, spec("db")) == [NO_POD]


async def test_what_can_not_be_found_out_is_not_said_but_logged(caplog: pytest.LogCaptureFixture) -> None:
    api = kube_apiserver()
    api.failing.add(PODS)
    assert await advice(api, spec("db")) == []
    assert "no advice on pods of namespace dev: away" in caplog.text
