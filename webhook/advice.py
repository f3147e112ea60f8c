"""Warnings about what is allowed and probably not what was meant: no pod is matched, no container has the port.

They tell something of pods, so they are for those who may list them. They are a courtesy: what can't be found out at
once is not said, and never holds a capture up.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.packetcapture import Filter, PacketCaptureSpec, format_ports
from api.selector import Labels
from kube.answers import Answers
from kube.client import PODS, Client, Json
from kube.status import StatusError
from webhook.access import Access
from webhook.review import User

_log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds; kube-apiserver gives the whole review five."""
_MOST_PODS = 200
_KEPT_FOR = 2.0
_NAMESPACES = 64
_NAMED = 3
_RUNNING = "status.phase!=Succeeded,status.phase!=Failed"
_NUMBERS = {6: "TCP", 17: "UDP", 132: "SCTP"}


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod, as far as a capture could miss it."""

    labels: Labels
    ports: frozenset[tuple[str, int]]
    """Protocol and number of each port that its containers declare."""


def advise(spec: PacketCaptureSpec, workloads: Sequence[Workload], *, namespace: str) -> list[str]:
    """The warnings, when `workloads` are all pods of the namespace."""
    selector = spec.pods()
    selected = [workload for workload in workloads if selector.matches(workload.labels)]
    if not selected:
        return [f"the selector matches no pod of namespace {namespace} now"]
    declared = frozenset[tuple[str, int]]().union(*(workload.ports for workload in selected))
    undeclared = [
        str(format_ports(ports))
        for entry in spec.filters
        for ports in entry.ports
        if not any(_takes(entry, ports, port) for port in declared)
    ]
    if not undeclared:
        return []
    named = ", ".join(undeclared[:_NAMED]) + (", …" if len(undeclared) > _NAMED else "")
    return [f"no container of the selected pods declares port {named}: is that the port meant?"]


class Advice:
    """Looks at the pods of a namespace once for a burst of captures, and at no more than two hundred of them."""

    def __init__(self, client: Client, access: Access, *, clock: Callable[[], float] | None = None) -> None:
        self._client = client
        self._access = access
        keeping: dict[str, Any] = {"clock": clock} if clock is not None else {}
        self._workloads: Answers[str, Sequence[Workload] | None] = Answers(
            lifetime=lambda _: _KEPT_FOR, size=_NAMESPACES, **keeping
        )

    async def on(self, spec: PacketCaptureSpec, *, user: User, namespace: str) -> list[str]:
        """What this user is to be told of a capture that is allowed."""
        try:
            async with asyncio.timeout(_PATIENCE):
                if not await self._access.may_list_pods(user=user, namespace=namespace):
                    return []
                workloads = await self._workloads.get(namespace, lambda: self._list(namespace))
        except (StatusError, TimeoutError, ValueError) as error:
            _log.warning("no advice on pods of namespace %s: %s", namespace, str(error) or "no answer in time")
            return []
        return [] if workloads is None else advise(spec, workloads, namespace=namespace)

    async def _list(self, namespace: str) -> Sequence[Workload] | None:
        """All running pods of the namespace; None when they are too many to be looked at. Raises `ValueError` too."""
        async for page in self._client.pages(PODS, namespace=namespace, field_selector=_RUNNING, limit=_MOST_PODS):
            return None if len(page.items) >= _MOST_PODS else [_workload(pod) for pod in page.items]
        return None


def _workload(pod: Json) -> Workload:
    spec = pod.get("spec") or {}
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    return Workload(
        labels=pod["metadata"].get("labels") or {},
        ports=frozenset(_port(port) for container in containers for port in container.get("ports") or ()),
    )


def _port(port: Mapping[str, Any]) -> tuple[str, int]:
    return str(port.get("protocol") or "TCP"), int(port["containerPort"])


def _takes(entry: Filter, ports: tuple[int, int], declared: tuple[str, int]) -> bool:
    protocol = _NUMBERS.get(entry.protocol) if isinstance(entry.protocol, int) else entry.protocol
    return protocol in (None, declared[0]) and ports[0] <= declared[1] <= ports[1]
