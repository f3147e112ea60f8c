"""What nodes report, kept so that a thousand of them with a hundred captures each cost little.

A report of a node names all its captures, of which few have changed. What is kept is small, is found by capture, and
each report says which captures it changed, and whether in state or merely in numbers.
"""

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from sys import intern
from typing import NamedTuple

from pydantic import ValidationError

from api.capturenode import CaptureNode, NodeCapture
from api.object import Model, ObjectMeta, format_timestamp
from api.packetcapture import NodeSummary, Phase

_log = logging.getLogger(__name__)

SILENT_AFTER = timedelta(minutes=2)
"""Without a word for so long, a node's agent is taken to be away; agents speak at least every 30 seconds."""
GRACE = timedelta(minutes=1)
"""What the first report that is known of a node says may be old because kube-apiserver was away, or a new leader."""

_EXPECTED = {"", "NoPacketYet", "FilterMatchedNothing", "Starting", "NoPodMatches", "PodHasNoAddress"}
"""Reasons of a node that captures, or waits for traffic, without any trouble."""


SILENT = "AgentSilent"
UNREADABLE = "ReportUnreadable"
_UNREADABLE_MESSAGE = "what the node's agent says can't be read: is it of another release?"


class Said(NamedTuple):
    """What one node says of one capture; the fields are those of `NodeCapture`."""

    node: str
    namespace: str
    name: str
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
            intern(capture.namespace),
            intern(capture.name),
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
        return self._replace(state="Error", reason=SILENT, message=message, pods=0)

    def unreadable(self) -> "Said":
        """The same while what the node says can't be read."""
        return self._replace(state="Error", reason=UNREADABLE, message=_UNREADABLE_MESSAGE, pods=0)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node says of all captures, by their UID, and when it said so by its own clock."""

    node: str
    heartbeat: datetime | None
    captures: Mapping[str, Said]
    unreadable: int = 0
    """Reports of captures that can't be read. Those of which the capture is known are among the captures."""


class _About(Model):
    """Of which capture a report is."""

    namespace: str
    name: str
    uid: str


def read(item: object) -> NodeReport:
    """A CaptureNode, made small. A bad report of a capture spoils no other. Raises `ValueError`."""
    node = CaptureNode.model_validate(item)
    name = intern(node.metadata.name)
    captures, unreadable = {}, 0
    for report in node.status.reports:
        try:
            capture = NodeCapture.read(report)
            captures[intern(capture.uid)] = Said.of(name, capture)
        except ValidationError:
            unreadable += 1
            with suppress(ValidationError):
                about = _About.model_validate_json(report)
                capture = NodeCapture(namespace=about.namespace, name=about.name, uid=about.uid, state="Error")
                captures[intern(capture.uid)] = Said.of(name, capture).unreadable()
    return NodeReport(name, node.status.heartbeat_time or node.metadata.creation_timestamp, captures, unreadable)


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
        self._grace: dict[str, datetime] = {}
        self._silent: set[str] = set()
        self._unreadable: set[str] = set()
        self._foreign: set[tuple[str, str]] = set()
        self._gone: defaultdict[str, set[str]] = defaultdict(set)
        self._by_capture: defaultdict[str, dict[str, Said]] = defaultdict(dict)

    @property
    def agents(self) -> int:
        """Nodes whose agent speaks."""
        return len(self._nodes) - len(self._silent)

    def put(self, report: NodeReport, now: datetime) -> Changed:
        """A node has said this. That it did counts by our clock, since the node's may be wrong."""
        before = self._nodes.get(report.node)
        if before is None:
            self._heard[report.node] = min(now, report.heartbeat) if report.heartbeat is not None else now
            self._grace[report.node] = now + GRACE
        elif before.heartbeat != report.heartbeat:
            self._heard[report.node] = now
            self._grace.pop(report.node, None)
        if report.unreadable and (before is None or before.unreadable != report.unreadable):
            _log.warning("of what node %s reports of captures, %d can't be read", report.node, report.unreadable)
        changed = Changed()
        if report.node in self._unreadable:
            self._unreadable.discard(report.node)
            changed.states.update(report.captures)
        known = before.captures if before is not None else {}
        captures = {uid: _with_numbers(said, known.get(uid)) for uid, said in report.captures.items()}
        self._nodes[report.node] = replace(report, captures=captures)
        for uid, said in captures.items():
            old = known.get(uid)
            if said == old:
                continue
            self._by_capture[uid][report.node] = said
            kind = changed.numbers if old is not None and old.outline == said.outline else changed.states
            kind.add(uid)
        self._forget(report.node, known.keys() - captures.keys(), changed)
        return changed

    def spoil(self, node: str) -> Changed:
        """What the node says now can't be read: what it said last stays, and that it is in trouble is told."""
        changed = Changed()
        if node in self._nodes and node not in self._unreadable:
            self._unreadable.add(node)
            changed.states.update(self._nodes[node].captures)
        return changed

    def remove(self, node: str) -> Changed:
        """There is no such node any more."""
        changed = Changed()
        if (before := self._nodes.pop(node, None)) is not None:
            for uid, said in before.captures.items():
                if said.packets:
                    self._gone[uid].add(node)
            self._forget(node, before.captures.keys(), changed)
        self._heard.pop(node, None)
        self._grace.pop(node, None)
        self._silent.discard(node)
        self._unreadable.discard(node)
        return changed

    def listen(self, now: datetime) -> Changed:
        """Find out who is silent now, and who speaks again."""
        changed = Changed()
        for node, heard in self._heard.items():
            if heard > now:  # our clock was set back
                self._heard[node] = now
            if (grace := self._grace.get(node)) is not None and not now < grace <= now + GRACE:
                del self._grace[node]
            silent = heard + SILENT_AFTER <= now and node not in self._grace
            if silent != (node in self._silent):
                (self._silent.add if silent else self._silent.discard)(node)
                changed.states.update(self._nodes[node].captures)
        return changed

    def of(self, capture: ObjectMeta, written: Iterable[NodeSummary] = ()) -> list[Said]:
        """What is to be said of a capture, node by node. What has its UID and another name is of no use, and logged.

        A node that is silent by what is `written` of it stays so until it speaks: a new leader knows no better.
        """
        silent = self._silent.union(node.node for node in written if node.reason == SILENT and node.node in self._grace)
        said = []
        for node, one in self._by_capture.get(capture.uid, {}).items():
            if (one.namespace, one.name) == (capture.namespace, capture.name):
                said.append(self._as_it_stands(node, one, silent=node in silent))
            elif (node, capture.uid) not in self._foreign:
                self._foreign.add((node, capture.uid))
                _log.warning("node %s reports %s/%s under the UID of another capture", node, one.namespace, one.name)
        return said

    def gone(self, capture: ObjectMeta, written: Iterable[NodeSummary]) -> set[str]:
        """Nodes that are no more and had packets of the capture, by what we heard or what is `written` of it."""
        named = {node.node for node in written if node.packets} | self._gone.get(capture.uid, set())
        return named - self._nodes.keys()

    def retain(self, uids: Collection[str]) -> None:
        """Forget what concerns no capture of these."""
        for uid in self._gone.keys() - uids:
            del self._gone[uid]

    @property
    def foreign(self) -> int:
        """Reports that are of no use, as they have the UID of one capture and the name of another."""
        return len(self._foreign)

    def _as_it_stands(self, node: str, said: Said, *, silent: bool) -> Said:
        if node in self._unreadable:
            return said.unreadable()
        return said.silent_since(self._heard[node]) if silent else said

    def _forget(self, node: str, uids: Iterable[str], changed: Changed) -> None:
        for uid in uids:
            entries = self._by_capture[uid]
            entries.pop(node, None)
            self._foreign.discard((node, uid))
            if not entries:
                del self._by_capture[uid]
            changed.states.add(uid)


def _with_numbers(said: Said, before: Said | None) -> Said:
    """Where the node's report of a capture can't be read the numbers of its last one stay."""
    return before.unreadable() if said.reason == UNREADABLE and before is not None else said
