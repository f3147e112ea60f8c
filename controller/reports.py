"""What nodes report, kept so that a thousand of them with a hundred captures each cost little.

A report of a node names all its captures, of which few have changed. What is kept is small, is found by capture, and
each report says which captures it changed, and whether in state or merely in numbers.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from sys import intern
from typing import NamedTuple

from api.capturenode import CaptureNode, NodeCapture
from api.object import format_timestamp
from api.packetcapture import Phase

SILENT_AFTER = timedelta(minutes=2)
"""Without a word for so long, a node's agent is taken to be away; agents speak at least every 30 seconds."""
GRACE = timedelta(minutes=1)
"""What the first report that is known of a node says may be old because kube-apiserver was away, or a new leader."""

_EXPECTED = {"", "NoPacketYet", "FilterMatchedNothing", "Starting", "NoPodMatches", "PodHasNoAddress"}
"""Reasons of a node that captures, or waits for traffic, without any trouble."""


class Said(NamedTuple):
    """What one node says of one capture; the fields are those of `NodeCapture`."""

    node: str
    state: Phase
    reason: str
    message: str
    pods: int
    matched: int
    packets: int
    bytes: int
    dropped: int
    seen: int
    evicted: int
    interruptions: int

    @classmethod
    def of(cls, node: str, capture: NodeCapture) -> "Said":
        return cls(
            node,
            capture.state,
            intern(capture.reason),
            intern(capture.message),
            capture.pods,
            capture.matched,
            capture.packets,
            capture.bytes,
            capture.dropped,
            capture.seen,
            capture.evicted,
            capture.interruptions,
        )

    @property
    def outline(self) -> tuple[object, ...]:
        """What is a state; the rest merely counts up."""
        return (
            self.state,
            self.reason,
            self.pods,
            self.matched,
            self.packets > 0,
            self.dropped > 0,
            self.evicted > 0,
            self.interruptions > 0,
        )

    @property
    def failed(self) -> bool:
        """Whether nothing is captured there that should be."""
        return self.state == "Error"

    @property
    def troubled(self) -> bool:
        """Whether something is not captured there that should be."""
        running = self.state in ("Capturing", "WaitingForTraffic")
        return self.failed or (running and self.reason not in _EXPECTED)

    def silent_since(self, moment: datetime) -> "Said":
        """The same while the agent is away: its numbers stay, and nobody knows what runs."""
        if self.state == "Finished":
            return self
        message = f"the node's agent has said nothing since {format_timestamp(moment)}"
        return self._replace(state="Error", reason="AgentSilent", message=message, pods=0)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node says of all captures, by their UID, and when it said so by its own clock."""

    node: str
    heartbeat: datetime | None
    captures: Mapping[str, Said]


def read(item: object) -> NodeReport:
    """A CaptureNode, made small. Raises `ValueError`."""
    node = CaptureNode.model_validate(item)
    name = intern(node.metadata.name)
    return NodeReport(
        name,
        node.status.heartbeat_time or node.metadata.creation_timestamp,
        {intern(capture.uid): Said.of(name, capture) for capture in node.status.captures},
    )


@dataclass(frozen=True, slots=True)
class Changed:
    """UIDs of captures: those of which a state changed, and those of which only numbers did."""

    states: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)


class Reports:
    """All that is reported now."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeReport] = {}
        self._heard: dict[str, datetime] = {}
        self._silent: set[str] = set()
        self._by_capture: defaultdict[str, dict[str, Said]] = defaultdict(dict)

    @property
    def agents(self) -> int:
        """Nodes whose agent speaks."""
        return len(self._nodes) - len(self._silent)

    def put(self, report: NodeReport, now: datetime) -> Changed:
        """A node has said this. That it did counts by our clock, since the node's may be wrong."""
        before = self._nodes.get(report.node)
        if before is None:
            spoke = min(now, report.heartbeat) if report.heartbeat is not None else now
            self._heard[report.node] = max(spoke, now - SILENT_AFTER + GRACE)
        elif before.heartbeat != report.heartbeat:
            self._heard[report.node] = now
        self._nodes[report.node] = report
        known = before.captures if before is not None else {}
        changed = Changed()
        for uid, said in report.captures.items():
            old = known.get(uid)
            if said == old:
                continue
            self._by_capture[uid][report.node] = said
            kind = changed.numbers if old is not None and old.outline == said.outline else changed.states
            kind.add(uid)
        self._forget(report.node, known.keys() - report.captures.keys(), changed)
        return changed

    def remove(self, node: str) -> Changed:
        """There is no such node any more."""
        changed = Changed()
        if (before := self._nodes.pop(node, None)) is not None:
            self._forget(node, before.captures.keys(), changed)
        self._heard.pop(node, None)
        self._silent.discard(node)
        return changed

    def listen(self, now: datetime) -> Changed:
        """Find out who is silent now, and who speaks again."""
        changed = Changed()
        for node, heard in self._heard.items():
            if heard > now:  # our clock was set back
                self._heard[node] = now
            silent = heard + SILENT_AFTER <= now
            if silent != (node in self._silent):
                (self._silent.add if silent else self._silent.discard)(node)
                changed.states.update(self._nodes[node].captures)
        return changed

    def of(self, uid: str) -> list[Said]:
        """What is to be said of a capture, node by node."""
        said = self._by_capture.get(uid, {})
        if self._silent.isdisjoint(said):
            return list(said.values())
        return [one.silent_since(self._heard[node]) if node in self._silent else one for node, one in said.items()]

    def _forget(self, node: str, uids: Iterable[str], changed: Changed) -> None:
        for uid in uids:
            entries = self._by_capture[uid]
            entries.pop(node, None)
            if not entries:
                del self._by_capture[uid]
            changed.states.add(uid)
