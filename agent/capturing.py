"""The agent's side of the capturer: keeps it doing what is wanted, whichever of the two was restarted.

Level-triggered: `want` replaces the whole set of targets, and every connection begins by asking what the capturer does
already. What differs is stopped, what is missing is started, what failed is tried again after a growing pause.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

from agent.capturer.protocol import (
    LINE_LIMIT,
    Changed,
    FileStatus,
    Reply,
    Report,
    Start,
    State,
    Stop,
    Target,
    TargetStatus,
    decode,
    encode,
)
from kube.watch import Signal

_AT_ONCE: Final = 16
_FIRST_RETRY: Final = 0.5
_LONGEST_RETRY: Final = 30.0
_RECONNECT: Final = 0.1
_OURS: Final = frozenset({"WriteFailed", "InternalError"})
"""Reasons of failures that have nothing to do with the pod, whose packets went on to come."""

log = logging.getLogger(__name__)


class CapturerError(Exception):
    """The capturer can't be reached, or refused; the message says which."""


class RefusedError(CapturerError):
    """The capturer understood the request and can't do it as things stand."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A run that ended although it is still wanted, and since when the next one has been well, if it is.

    It is kept meanwhile: when that one ends too before it was well for longer than `pause`, the next pause is longer.
    """

    status: TargetStatus
    pause: float
    retry_at: float
    well_since: float | None = None


class Capturer:
    """What the capturer does, and the means to change it."""

    def __init__(
        self,
        socket: Path,
        *,
        on_status: Callable[[TargetStatus], object],
        on_end: Callable[[TargetStatus], object],
        on_lost: Callable[[Sequence[TargetStatus]], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_status` is called with all that the capturer tells, `on_end` once for each run, with its last status.

        `on_lost` is called first with runs that ended though they are wanted: those that a worker took with it, and one
        that failed to write, once it goes on. What came in between is in no file.
        """
        self._socket = socket
        self._on_status = on_status
        self._on_end = on_end
        self._on_lost = on_lost
        self._clock = clock
        self._wanted: Mapping[str, Target] | None = None
        self._statuses: dict[str, TargetStatus] = {}
        self._failures: dict[str, _Failure] = {}
        self._working: set[str] = set()
        self._refused: set[str] = set()
        self._worker: int | None = None
        self.restarts = 0
        self._changed = Signal()
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._parts: dict[int, list[TargetStatus]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._known = asyncio.Event()

    @property
    def is_known(self) -> bool:
        """Whether the capturer has said what it does, and the connection still stands."""
        return self._known.is_set()

    async def known(self) -> None:
        """Wait until that is so."""
        await self._known.wait()

    @property
    def engaged(self) -> frozenset[str]:
        """Targets whose files the capturer may be writing: started, or being started or stopped."""
        return frozenset(self._statuses.keys() | self._working)

    def want(self, targets: Mapping[str, Target]) -> None:
        """Capture these targets and no others. Before the first call whatever runs goes on."""
        self._wanted = MappingProxyType(dict(targets))
        self._changed.set()

    def status(self, target_id: str) -> TargetStatus | None:
        """What a wanted target does; after a failure that of the last run, until another one settled."""
        failure = self._failures.get(target_id)
        return failure.status if failure and failure.well_since is None else self._statuses.get(target_id)

    def running(self) -> list[TargetStatus]:
        """All runs of which the capturer still has a status."""
        return list(self._statuses.values())

    async def refresh(self, ids: Iterable[str] | None = None, *, flush: bool = False) -> None:
        """Ask for new statuses, with `flush` after all packets seen were written to the files. Raises CapturerError."""
        chosen = tuple(ids) if ids is not None else None
        reply = await self._ask(Report(request=next(self._numbers), ids=chosen, flush=flush))
        for status in reply.targets:
            self._told(status)

    async def run(self) -> NoReturn:
        """Stay connected for ever."""
        told = False
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._socket, limit=LINE_LIMIT)
            except OSError as error:
                if not told:
                    log.warning("the capturer can't be reached at %s: %s", self._socket, error)
                    told = True
                await asyncio.sleep(_RECONNECT)
                continue
            told = False
            try:
                await self._serve(reader)
            except* (ConnectionError, ValueError, CapturerError) as group:
                log.warning("the connection to the capturer ended: %s", "; ".join(map(str, group.exceptions)))
            finally:
                self._disconnected()
            await asyncio.sleep(_RECONNECT)

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(reader), name="capturer replies")
            reply = await self._ask(Report(request=next(self._numbers)))
            self._learn(reply)
            while True:
                self._converge(tasks)
                await self._changed.wait(self._seconds_to_retry())

    def _learn(self, reply: Reply) -> None:
        """Take up what the capturer does; runs of before that it does not know have ended with the worker."""
        if self._worker not in (None, reply.worker):
            self.restarts += 1
        self._worker = reply.worker
        present = {status.target.id: status for status in reply.targets}
        gone = [old for old in self._statuses.values() if not _same_run(old, present.get(old.target.id))]
        for old in gone:
            del self._statuses[old.target.id]
        if lost := [old for old in gone if self._is_interrupted(old)]:
            self._on_lost(lost)
        for old in gone:
            self._on_end(old)
        self._known.set()
        for status in reply.targets:
            self._told(status)

    def _is_interrupted(self, run: TargetStatus) -> bool:
        """Whether a run that is gone should have gone on. A worker that has to end stops its runs well, but unasked."""
        if not run.state.ended:
            return True
        wanted = self._wanted.get(run.target.id) if self._wanted is not None else None
        return wanted is not None and _same_but_end(wanted, run.target) and _is_ours(run)

    def _converge(self, tasks: asyncio.TaskGroup) -> None:
        if self._wanted is None:
            return
        now = self._clock()
        for target_id in self._failures.keys() - self._wanted.keys():
            del self._failures[target_id]
        for target_id, status in list(self._statuses.items()):
            if len(self._working) >= _AT_ONCE or target_id in self._working:
                continue
            wanted = self._wanted.get(target_id)
            if wanted is None or status.state.ended or not _same_but_end(wanted, status.target):
                self._working.add(target_id)
                tasks.create_task(self._stop(target_id), name=f"stop {target_id}")
            elif wanted.until != status.target.until:
                action = self._stop(target_id) if target_id in self._refused else self._start(wanted)
                self._working.add(target_id)
                tasks.create_task(action, name=f"move the end of {target_id}")
        for target_id, target in self._wanted.items():
            failure = self._failures.get(target_id)
            due = failure is None or failure.retry_at <= now
            absent = target_id not in self._statuses and target_id not in self._working
            if absent and due and len(self._working) < _AT_ONCE:
                action = self._stop(target_id) if target_id in self._refused else self._start(target)
                self._working.add(target_id)
                tasks.create_task(action, name=f"start {target_id}")

    def _seconds_to_retry(self) -> float | None:
        now = self._clock()
        absent = [failure for target_id, failure in self._failures.items() if target_id not in self._statuses]
        # What is due is being started, or waits for a start to be done, which is a change.
        retries = [failure.retry_at for failure in absent if failure.retry_at > now]
        return max(0.01, min(retries) - now) if retries else None

    async def _start(self, target: Target) -> None:
        try:
            reply = await self._ask(Start(request=next(self._numbers), target=target))
            for status in reply.targets:
                self._told(status)
                if not status.state.ended:
                    self._settled(target.id)
        except RefusedError as error:  # it ended just now, or knows another target by this name: stopped, then started
            log.info("starting %s: %s", target.id, error)
            self._refused.add(target.id)
        finally:
            self._working.discard(target.id)
            self._changed.set()

    async def _stop(self, target_id: str) -> None:
        try:
            reply = await self._ask(Stop(request=next(self._numbers), id=target_id))
            for status in reply.targets:
                self._on_status(status)
                self._ended(status)
            self._statuses.pop(target_id, None)
            self._refused.discard(target_id)
        finally:
            self._working.discard(target_id)
            self._changed.set()

    def _settled(self, target_id: str) -> None:
        failure = self._failures.get(target_id)
        if failure is None or failure.well_since is not None:
            return
        self._failures[target_id] = replace(failure, well_since=self._clock())
        if _is_ours(failure.status):
            self._on_lost([failure.status])

    def _ended(self, status: TargetStatus) -> None:
        target_id = status.target.id
        if self._wanted is not None and self._wanted.get(target_id) == status.target:
            now = self._clock()
            pause = _pause_after(self._failures.get(target_id), now)
            self._failures[target_id] = _Failure(status, pause, now + pause)
            if status.state is State.FAILED:
                log.warning("capturing pod %s failed: %s (%s)", status.target.pod_name, status.message, status.reason)
        self._on_end(status)

    def _told_in_part(self, status: TargetStatus) -> None:
        """Files that a change does not name are as they were told before."""
        known = self._statuses.get(status.target.id)
        self._told(_merged(known, status) if known is not None and _same_run(known, status) else status)

    def _told(self, status: TargetStatus) -> None:
        self._statuses[status.target.id] = status
        self._on_status(status)
        if status.state.ended:
            self._changed.set()

    async def _ask(self, message: Start | Stop | Report) -> Reply:
        if self._writer is None:
            raise CapturerError("the capturer is not connected")
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[message.request] = future
        try:
            self._writer.write(encode(message))
            reply = await future
        finally:
            self._replies.pop(message.request, None)
            self._parts.pop(message.request, None)
        if reply.error:
            raise RefusedError(f"the capturer refused: {reply.error}")
        return reply

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = decode(line)
            if isinstance(message, Changed):
                # A change may overtake the answer to a stop, but never tells of a run that was forgotten.
                self._told_in_part(message.target)
            elif isinstance(message, Reply):
                self._replied(message)
                await asyncio.sleep(0)  # whoever asked takes it up before what came after it
        raise ConnectionResetError("the capturer closed it")

    def _replied(self, reply: Reply) -> None:
        future = self._replies.get(reply.request)
        if future is None or future.done():
            return
        parts = self._parts.setdefault(reply.request, [])
        parts += reply.targets
        if not reply.more:
            future.set_result(replace(reply, targets=tuple(parts)))

    def _disconnected(self) -> None:
        self._known.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self._replies.values():
            if not future.done():
                future.set_exception(CapturerError("the capturer went away"))
        self._working.clear()


def _pause_after(earlier: _Failure | None, now: float) -> float:
    """How long to wait after a run that ended now; `earlier` is the failure before it."""
    if earlier is None or (earlier.well_since is not None and now - earlier.well_since > earlier.pause):
        return _FIRST_RETRY
    return min(earlier.pause * 2, _LONGEST_RETRY)


def _is_ours(ended: TargetStatus) -> bool:
    """Whether the end of a run that is wanted has nothing to do with the pod, whose packets went on to come."""
    over = ended.target.until is not None and ended.target.until <= time.time()
    return (ended.state is State.STOPPED and not over) or ended.reason in _OURS


def _same_run(one: TargetStatus, other: TargetStatus | None) -> bool:
    return other is not None and one.started == other.started


def _same_but_end(one: Target, other: Target) -> bool:
    return one == other or replace(one, until=other.until) == other


def _merged(known: TargetStatus, news: TargetStatus) -> TargetStatus:
    """The later status, with the files that it does not name."""
    before = {interface.interface: interface.files for interface in known.interfaces}
    interfaces = tuple(
        replace(interface, files=_files(before.get(interface.interface, ()), interface.files))
        for interface in news.interfaces
    )
    return replace(news, interfaces=interfaces)


def _files(known: Iterable[FileStatus], news: Iterable[FileStatus]) -> tuple[FileStatus, ...]:
    return tuple(({file.name: file for file in known} | {file.name: file for file in news}).values())
