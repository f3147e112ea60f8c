"""Writes this node's CaptureNode object: at once when a state changes, seldom when only counters do.

Every write goes to whoever watches, so what does not matter waits: `pace` decides, and is a pure function of the time.
"""

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final, NoReturn

from agent.summary import FILTER_MATCHED_NOTHING
from api.capturenode import MOST_REPORTS, CaptureNodeStatus, Capturer, Disk, NodeCapture
from kube.client import CAPTURENODES, NODES, Client, Json
from kube.status import StatusError
from kube.watch import Signal

FIELD_MANAGER: Final = "kubepcap-agent"
_WRITES_PER_SECOND: Final = 120
"""What all agents together write at most when all have something to tell; kube-apiserver serves others too."""

_LONGEST_RETRY: Final = 30.0
_LARGEST_BODY: Final = 700_000
"""Bytes of all reports of captures; etcd takes objects of 1.5 MB."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds between writes: at least, for changed states; at most, for changed counters; at most, for no change."""

    states: float = 0.25
    counters: float = 30.0
    heartbeat: float = 30.0


@dataclass(frozen=True)
class Facts:
    """What there is to report."""

    captures: tuple[NodeCapture, ...] = ()
    disk: Disk | None = None
    capturer: Capturer | None = None

    @cached_property
    def states(self) -> list[tuple[object, ...]]:
        """What a person waits for to change."""
        return [_state(item) for item in self.captures]


def _state(item: NodeCapture) -> tuple[object, ...]:
    message = "" if item.reason == FILTER_MATCHED_NOTHING else item.message
    counted = bool(item.evicted), item.interruptions, item.interrupted_at
    return item.uid, item.state, item.reason, message, item.pods, item.matched, *counted


@dataclass(frozen=True, slots=True)
class Spread:
    """How agents that all have something to tell at once share the time: within `seconds` each tells it once, this one
    after its `share` of them (0 to 1)."""

    seconds: float = 0.0
    share: float = 0.0

    @classmethod
    def of(cls, agents: int, *, share: float) -> "Spread":
        return cls(agents / _WRITES_PER_SECOND, share)


_ALONE: Final = Spread()


def pace(
    *,
    written: Facts | None,
    written_at: float,
    current: Facts,
    changed_at: float,
    now: float,
    intervals: Intervals,
    spread: Spread = _ALONE,
) -> float:
    """Seconds until the facts should be written; 0 means now. `written` is None before the first write.

    `changed_at` is when they came to differ from what is written.
    """
    if written is None:
        return 0.0
    if written.states != current.states:
        earliest = written_at + max(intervals.states, spread.seconds)
        return max(0.0, max(earliest, changed_at + spread.share * spread.seconds) - now)
    interval = intervals.counters if written.captures != current.captures else intervals.heartbeat
    return max(0.0, written_at + interval - now)


def fitting(captures: Sequence[NodeCapture], *, size: int = _LARGEST_BODY) -> tuple[list[str], int]:
    """The reports for which there is room in so many bytes, in the order given, and how many captures are left out.

    What runs or is in trouble goes first, and of it one capture of each namespace after the other: whoever makes many
    captures takes the room from himself.
    """
    turns: Counter[tuple[bool, str]] = Counter()
    ranked = []
    for position, capture in enumerate(captures):
        idle = capture.state in ("Scheduled", "Finished")
        ranked.append((idle, turns[idle, capture.namespace], position))
        turns[idle, capture.namespace] += 1
    chosen: dict[int, str] = {}
    for _, _, position in sorted(ranked)[:MOST_REPORTS]:
        report = captures[position].written()
        size -= len(json.dumps(report, ensure_ascii=False).encode()) + 1
        if size < 0:
            break
        chosen[position] = report
    return [chosen[position] for position in sorted(chosen)], len(captures) - len(chosen)


class Reporter:
    """Owns the CaptureNode of this node."""

    def __init__(
        self,
        client: Client,
        *,
        node: str,
        pod: str,
        version: str,
        intervals: Intervals,
        on_write: Callable[[StatusError | None], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_write` is called after each write, with the error when there was one."""
        self._client = client
        self._node = node
        self._pod = pod
        self._version = version
        self._intervals = intervals
        self._on_write = on_write
        self._clock = clock
        self._current: Facts | None = None
        self._agents = 0
        self._changed = Signal()
        self._owner: Json | None = None

    def update(
        self,
        captures: Sequence[NodeCapture],
        *,
        disk: Disk | None = None,
        capturer: Capturer | None = None,
        agents: int = 0,
    ) -> None:
        """Report this from now on; when it is written, `run` decides. `agents` is how many there are in the cluster."""
        self._agents = agents
        ordered = sorted(captures, key=lambda capture: (capture.namespace, capture.name, capture.uid))
        facts = Facts(tuple(ordered), disk, capturer)
        if facts != self._current:
            self._current = facts
            self._changed.set()

    async def run(self) -> NoReturn:
        """Write for ever; what kube-apiserver refuses is tried again after a growing pause."""
        written: Facts | None = None
        written_at, changed_at = float("-inf"), float("inf")
        share = random.random()  # noqa: S311
        retry = 1.0
        while True:
            facts = self._current
            if facts is None:  # an empty report would say that nothing is captured here
                await self._changed.wait()
                continue
            unchanged = written is not None and written.states == facts.states
            changed_at = float("inf") if unchanged else min(changed_at, self._clock())
            wait = pace(
                written=written,
                written_at=written_at,
                current=facts,
                changed_at=changed_at,
                now=self._clock(),
                intervals=self._intervals,
                spread=Spread.of(self._agents, share=share),
            )
            if wait > 0:
                await self._changed.wait(wait)
                continue
            try:
                await self._write(facts)
            except StatusError as error:
                log.warning("writing the CaptureNode %s: %s", self._node, error.message)
                self._on_write(error)
                await asyncio.sleep(retry)
                retry = min(retry * 2, _LONGEST_RETRY)
                continue
            self._on_write(None)
            retry = 1.0
            written, written_at, changed_at = facts, self._clock(), float("inf")
            share = random.random()  # noqa: S311

    async def _write(self, facts: Facts) -> None:
        if self._owner is None:
            node = await self._client.get(NODES, self._node)
            # Garbage collection then removes the object together with its Node.
            self._owner = {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": node["metadata"]["uid"]}
        reports, omitted = fitting(facts.captures)
        if omitted:
            log.warning("%d captures concern this node, %d are reported", len(facts.captures), len(reports))
        status = CaptureNodeStatus(
            heartbeat_time=datetime.now(UTC),
            pod=self._pod,
            version=self._version,
            disk=facts.disk,
            capturer=facts.capturer,
            reports=reports,
            omitted=omitted,
        )
        body: dict[str, Any] = {
            "apiVersion": CAPTURENODES.api_version,
            "kind": CAPTURENODES.kind,
            "metadata": {"name": self._node, "ownerReferences": [self._owner]},
            "status": status.to_json(),
        }
        await self._client.apply(CAPTURENODES, self._node, body, field_manager=FIELD_MANAGER)
