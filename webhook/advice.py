"""Warnings about what is allowed and probably not what was meant: no pod is matched, no container has the port.

They tell something of pods, so they are for those who may list them. They are a courtesy: what can't be found out at
once is not said, and never holds a capture up.
"""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.packetcapture import Filter, PacketCaptureSpec, format_ports
from api.selector import Labels, PodSelector
from kube.answers import Answers
from kube.client import PODS, Client, Json
from kube.status import StatusError
from webhook.access import Access
from webhook.review import User

_log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds; kube-apiserver gives the whole review five."""
_LIST_PATIENCE = 0.5
"""Seconds; shorter, so that a list that is given up ends before the reviews that wait for it, and is known as such."""
_MOST_PODS = 200
_MOST_BYTES = 4 << 20
_MOST_PORTS = 100
"""Of one pod; that of thousands none is meant can't be told in a moment."""
_LISTS_AT_ONCE = 4
_KEPT_FOR = 2.0
_GIVEN_UP_FOR = 10.0
"""Seconds; longer, because what could not be looked at costs the most."""
_NAMESPACES = 64
_CAPACITY = 4 << 20
"""Of `_weight`, in all namespaces together."""
_ENTRY = 200
"""Bytes that Python needs for a label or a port besides the text."""
_NAMED = 3
_RUNNING = "status.phase!=Succeeded,status.phase!=Failed"
_NUMBERS = {6: "TCP", 17: "UDP", 132: "SCTP"}


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod, as far as a capture could miss it."""

    labels: Labels
    ports: frozenset[tuple[str, int]] | None
    """Protocol and number of each port that its containers declare; None when they are too many to be looked at."""


class _Declared:
    """Ports that containers declare, sorted for each protocol."""

    def __init__(self, ports: Collection[tuple[str, int]]) -> None:
        self._numbers: dict[str, list[int]] = {}
        for protocol, number in sorted(ports):
            self._numbers.setdefault(protocol, []).append(number)

    def has_one_for(self, entry: Filter, ports: tuple[int, int]) -> bool:
        """Whether the entry takes one of them by this one of its ranges."""
        protocol = _NUMBERS.get(entry.protocol) if isinstance(entry.protocol, int) else entry.protocol
        candidates = self._numbers.values() if protocol is None else [self._numbers.get(protocol, [])]
        return any(_has_one_in(numbers, ports) for numbers in candidates)


def advise(spec: PacketCaptureSpec, selected: Sequence[Workload], *, namespace: str) -> list[str]:
    """The warnings, when `selected` are all pods of the namespace that the spec selects."""
    if not selected:
        return [f"the selector matches no pod of namespace {namespace} now"]
    known = [workload.ports for workload in selected if workload.ports is not None]
    if len(known) < len(selected):
        return []
    declared = _Declared(frozenset[tuple[str, int]]().union(*known))
    undeclared = [
        str(format_ports(ports))
        for entry in spec.filters
        for ports in entry.ports
        if not declared.has_one_for(entry, ports)
    ]
    if not undeclared:
        return []
    named = ", ".join(undeclared[:_NAMED]) + (", …" if len(undeclared) > _NAMED else "")
    return [f"no container of the selected pods declares port {named}: is that the port meant?"]


class Advice:
    """Looks at the pods of a namespace once for a burst of captures, at no more than two hundred pods and 4 MiB."""

    def __init__(self, client: Client, access: Access, *, clock: Callable[[], float] | None = None) -> None:
        self._client = client
        self._access = access
        keeping: dict[str, Any] = {"clock": clock} if clock is not None else {}
        self._workloads: Answers[str, Sequence[Workload] | None] = Answers(
            lifetime=lambda workloads: _GIVEN_UP_FOR if workloads is None else _KEPT_FOR,
            size=_NAMESPACES,
            weigh=_weight,
            capacity=_CAPACITY,
            **keeping,
        )
        self._places = asyncio.Semaphore(_LISTS_AT_ONCE)

    async def on(self, spec: PacketCaptureSpec, *, user: User, namespace: str) -> list[str]:
        """What this user is to be told of a capture that is allowed."""
        try:
            async with asyncio.timeout(_PATIENCE):
                if not await self._access.may_list_pods(user=user, namespace=namespace):
                    return []
                workloads = await self._workloads.get(namespace, lambda: self._look(namespace))
                if workloads is None:
                    return []
                return advise(spec, await _selected(spec.pods(), workloads), namespace=namespace)
        except (StatusError, TimeoutError) as error:
            _log_silence(namespace, error)
            return []

    async def _look(self, namespace: str) -> Sequence[Workload] | None:
        """All running pods of the namespace; None when they can't be looked at, or are too many."""
        try:
            async with asyncio.timeout(_LIST_PATIENCE), self._places:
                return await self._list(namespace)
        except (StatusError, TimeoutError, ValueError) as error:
            _log_silence(namespace, error)
            return None

    async def _list(self, namespace: str) -> Sequence[Workload] | None:
        """All running pods of the namespace; None when they are too many to be looked at. Raises `ValueError` too."""
        pages = self._client.pages(
            PODS, namespace=namespace, field_selector=_RUNNING, limit=_MOST_PODS, most_bytes=_MOST_BYTES
        )
        async for page in pages:
            return None if len(page.items) >= _MOST_PODS else _workloads(page.items)
        return None


async def _selected(selector: PodSelector, workloads: Sequence[Workload]) -> list[Workload]:
    """Those that it matches. One of thousands of tests takes milliseconds for each, while others wait."""
    selected = []
    for workload in workloads:
        await asyncio.sleep(0)
        if selector.matches(workload.labels):
            selected.append(workload)
    return selected


def _log_silence(namespace: str, error: Exception) -> None:
    _log.warning("no advice on pods of namespace %s: %s", namespace, str(error) or "no answer in time")


def _workloads(pods: Sequence[Json]) -> Sequence[Workload]:
    """Those that differ: the replicas of a Deployment are one."""
    found = (_workload(pod) for pod in pods)
    return list({(frozenset(workload.labels.items()), workload.ports): workload for workload in found}.values())


def _workload(pod: Json) -> Workload:
    spec = pod.get("spec") or {}
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    ports = [port for container in containers for port in container.get("ports") or ()]
    return Workload(
        labels=pod["metadata"].get("labels") or {},
        ports=None if len(ports) > _MOST_PORTS else frozenset(_port(port) for port in ports),
    )


def _port(port: Mapping[str, Any]) -> tuple[str, int]:
    return str(port.get("protocol") or "TCP"), int(port["containerPort"])


def _has_one_in(numbers: Sequence[int], ports: tuple[int, int]) -> bool:
    """Whether one of the sorted numbers is in the range."""
    low, high = ports
    position = bisect_left(numbers, low)
    return position < len(numbers) and numbers[position] <= high


def _weight(workloads: Sequence[Workload] | None) -> int:
    """About as many bytes as keeping them takes."""
    return sum(
        sum(_ENTRY + len(key) + len(value) for key, value in workload.labels.items())
        + _ENTRY * len(workload.ports or ())
        for workload in workloads or ()
    )
