"""Warnings about pods: only to those who may see them, never in the way."""

import asyncio
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
    selected = [workload for workload in (WEB, DNS, BARE) if given.pods().matches(workload.labels)]
    assert advise(given, selected, namespace="dev") == warnings


def test_in_a_namespace_without_pods_none_is_matched() -> None:
    assert advise(spec(), [], namespace="dev") == [NO_POD]


def test_of_ports_that_were_not_looked_at_nothing_is_said() -> None:
    crowded = Workload({"app": "web"}, None)
    assert advise(spec("web", {"ports": [1]}), [WEB, crowded], namespace="dev") == []
    assert advise(spec("web", {"ports": [1]}), [WEB], namespace="dev") == [undeclared("1")]


def test_a_port_is_found_without_a_look_at_every_other() -> None:
    compared = 0

    class Number(int):
        def __lt__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return int(self) < other

        def __le__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return int(self) <= other

        def __ge__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return int(self) >= other

    crowded = Workload({"app": "web"}, frozenset(("TCP", Number(port)) for port in range(2, 20_002, 2)))
    filters: list[dict[str, Any]] = [{"ports": list(range(2 * start + 1, 2 * start + 129, 2))} for start in (0, 100)]
    (warning,) = advise(spec("web", *filters), [crowded], namespace="dev")
    assert warning == undeclared("1, 3, 5, …")
    in_sorting = 20_000 * 15
    in_searching = 128 * 17
    assert compared < in_sorting + in_searching


def test_each_is_short_enough_for_kubectl() -> None:
    widest = {"ports": ["60001:60002", "60003:60004", "60005:60006", "60007:60008"]}
    for given in (spec("other"), spec("web", widest)):
        selected = [WEB] if given.pods().matches(WEB.labels) else []
        (warning,) = advise(given, selected, namespace="n" * 63)
        assert len(warning) < 120


def kube_apiserver(**settings: Any) -> KubeApiserver:
    api = KubeApiserver(**settings)
    api.add(PODS, "web", labels={"app": "web"}, spec={"containers": [{"ports": [{"containerPort": 80}]}]})
    return api


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def advice(
    api: KubeApiserver, given: PacketCaptureSpec, *, times: int = 1, source: Advice | None = None
) -> list[str]:
    source = source or Advice(api.client, Access(api.client))
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


async def test_pods_that_could_not_be_looked_at_are_left_alone_for_a_while() -> None:
    api, clock = kube_apiserver(), Clock()
    source = Advice(api.client, Access(api.client), clock=clock)
    api.failing.add(PODS)
    assert await advice(api, spec("db"), times=5, source=source) == []
    api.failing.clear()
    clock.now = 9.9
    assert await advice(api, spec("db"), source=source) == []
    assert api.lists == [PODS]
    clock.now = 10
    assert await advice(api, spec("db"), source=source) == [NO_POD]


async def test_a_list_that_does_not_come_is_waited_for_once(caplog: pytest.LogCaptureFixture) -> None:
    api = kube_apiserver()
    api.silent.add(PODS)
    assert await advice(api, spec("db"), times=5) == []
    assert api.lists == [PODS]
    assert caplog.text.count("no advice on pods of namespace dev: no answer in time") == 1


async def test_a_list_is_asked_for_with_a_bound_on_its_bytes_and_few_are_under_way() -> None:
    api = kube_apiserver()
    api.silent.add(PODS)
    source = Advice(api.client, Access(api.client))
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(source.on(spec(), user=ALICE, namespace=f"n{number}"), name=f"n{number}")
    assert set(api.most_bytes) == {4 << 20}
    assert api.most_at_once == 4


async def test_a_pod_of_thousands_of_ports_is_matched_and_its_ports_are_not_looked_at() -> None:
    api = KubeApiserver()
    ports = [{"containerPort": port} for port in range(1, 65536)]
    api.add(PODS, "web", labels={"app": "web"}, spec={"containers": [{"ports": ports}]})
    assert await advice(api, spec("web", {"protocol": "UDP", "ports": [53]})) == []
    assert await advice(api, spec("db", {"protocol": "UDP", "ports": [53]})) == [NO_POD]


async def test_what_is_kept_of_all_namespaces_is_bounded() -> None:
    api = KubeApiserver()
    labels = {f"key-{number}": "v" * 63 for number in range(4000)}
    api.add(PODS, "web", labels={"app": "web"} | labels, spec={})
    source = Advice(api.client, Access(api.client), clock=Clock())
    for namespace in ("a", "b", "a", "c", "d", "e", "f", "b"):
        assert await source.on(spec("db"), user=ALICE, namespace=namespace)
    assert len(api.lists) == 7


async def test_others_have_their_turn_after_each_pod() -> None:
    api = KubeApiserver()
    for number in range(100):
        api.add(PODS, f"p{number}", labels={"app": f"web-{number}"}, spec={})
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others(), name="others")
    assert await advice(api, spec("db")) == [NO_POD]
    waiting.cancel()
    assert turns >= 100
