"""The leader's work on captures: it admits them, writes their status, which nobody else does, and deletes what is over.

Each pass looks at the captures about which something changed, and at those whose time has come. One with which
something is wrong is passed over, and logged; the others go on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn
from zlib import crc32

from pydantic import ValidationError

from api.object import ObjectMeta, explain
from api.packetcapture import PacketCapture, PacketCaptureStatus
from controller import reports
from controller.agenda import Agenda
from controller.events import Events, started_by, transitions
from controller.expiry import goes_at
from controller.quota import Admission, admit
from controller.reports import Changed, Reports
from controller.summary import headline, outline, settles_at, summarize, unreadable, without_numbers
from kube.client import CAPTURENODES, PACKETCAPTURES, Client, Json
from kube.status import StatusError
from kube.watch import Cache, Key, Signal

_log = logging.getLogger(__name__)

_RETRY = timedelta(seconds=5)
_LONGEST_PAUSE = 30.0
"""Seconds; after that, silence of agents is noticed at the latest."""
_GATHER = 0.1
"""Seconds in which changes that come together become one pass."""
_REST = 3.0
"""Pauses for each second of computing, so that many reports of many nodes take a quarter of a core at most."""
_SPACING_PER_AGENT = timedelta(milliseconds=10)
_HEADLINES = 5
"""Changes of the headline of one capture that are written at once; further ones wait for each other."""
_HEADLINE_SPACING = timedelta(seconds=1)
_MANY = 0.2
"""By what share the number of agents has to change for all captures to tell them."""
_NODES_PER_PAGE = 50
"""A CaptureNode may hold hundreds of captures."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A capture whose spec can't be read, and why."""

    metadata: ObjectMeta
    status: PacketCaptureStatus
    message: str


Known = PacketCapture | Unreadable


def read(item: Json) -> Known:
    """Read a capture; one whose spec is wrong too, so that its status can say so. Raises `ValueError`."""
    try:
        return PacketCapture.model_validate(item)
    except ValidationError as error:
        metadata = ObjectMeta.model_validate(item["metadata"])
        try:
            status = PacketCaptureStatus.model_validate(item.get("status") or {})
        except ValidationError:
            status = PacketCaptureStatus()
        return Unreadable(metadata, status, explain(error))


def write_at(
    written: PacketCaptureStatus,
    wanted: PacketCaptureStatus,
    *,
    last: datetime | None,
    headline_at: datetime,
    spacing: timedelta,
    counters_interval: timedelta,
    now: datetime,
) -> datetime | None:
    """When the status is to be written, `last` being the last time that it was; None when there is nothing new.

    Every write reaches every agent. So what changes for the capture as a whole is written at once, unless that is often
    the case (then at `headline_at`), what changes on its nodes `spacing` apart, and what merely counts up at longer
    intervals.
    """
    if wanted == written:
        return None
    if last is None:
        return now
    if headline(wanted) != headline(written):
        return max(now, headline_at)
    interval = spacing if outline(wanted) != outline(written) else counters_interval
    return max(now, min(last, now) + interval)


@dataclass(frozen=True, slots=True)
class Headlines:
    """When the headline of one capture may be written: a bucket of a few, filled again at a steady pace.

    Kept as the moment at which it will be full (https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm).
    """

    full_at: datetime

    def next(self, spacing: timedelta, now: datetime) -> datetime:
        """When there may be one more."""
        return self._full_at(spacing, now) - (_HEADLINES - 1) * spacing

    def after(self, spacing: timedelta, now: datetime) -> "Headlines":
        """What is left once one was written now."""
        return Headlines(self._full_at(spacing, now) + spacing)

    def _full_at(self, spacing: timedelta, now: datetime) -> datetime:
        return min(max(self.full_at, now), now + _HEADLINES * spacing)  # however the clock was set


def first_written(uid: str, *, began: datetime, interval: timedelta) -> datetime:
    """What a new leader takes for the last write of a capture that others wrote: spread, so that not all are due."""
    return began - interval * (crc32(uid.encode()) / 2**32)


class Captures:
    """Own `run` in a TaskGroup. `counters_interval` is the shortest time between two writes of mere counters."""

    def __init__(
        self,
        client: Client,
        *,
        events: Events,
        counters_interval: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._events = events
        self._counters_interval = counters_interval
        self._clock = clock
        self._signal = Signal()
        self._captures = Cache(client, PACKETCAPTURES, read, on_change=self._capture_changed)
        self._nodes = Cache(client, CAPTURENODES, reports.read, on_change=self._node_changed, page=_NODES_PER_PAGE)
        self._reports = Reports()
        self._agenda = Agenda()
        self._admitted: set[str] | None = None
        self._admissions: Mapping[str, Admission] = {}
        self._admissions_until: datetime | None = None
        self._passed_at: datetime | None = None
        self._written: dict[str, Known] = {}
        self._written_at: dict[str, datetime] = {}
        self._headlines: dict[str, Headlines] = {}
        self._began = clock()
        self._agents_told = 0

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._captures.run(), name="following captures")
            tasks.create_task(self._nodes.run(), name="following nodes")
            await self._captures.synced()
            await self._nodes.synced()
            while True:
                spent = time.process_time()
                pause = await self._pass()
                spent = time.process_time() - spent
                await asyncio.sleep(max(_GATHER, _REST * spent))
                await self._signal.wait(pause)
        raise AssertionError

    def _capture_changed(self, key: Key) -> None:
        capture = self._captures.objects.get(key)
        if capture is not None:
            written = self._written.get(capture.metadata.uid)
            if written is not None and _version(written) == _version(capture):
                return  # we know: we wrote it
            self._agenda.touch([capture.metadata.uid])
        self._admissions_until = None
        self._signal.set()

    def _node_changed(self, key: Key) -> None:
        """Keep what the node says; what merely counts up waits until the status may be written again."""
        now = self._clock()
        report = self._nodes.get(key.name)
        if report is not None:
            changed = self._reports.put(report, now)
        elif key in self._nodes.unparsable:
            changed = self._reports.spoil(key.name)
        else:
            changed = self._reports.remove(key.name)
        self._note(changed, now)
        self._count_agents()
        self._signal.set()

    def _count_agents(self) -> None:
        """When there are many more agents than all were told, or many less, all captures are to tell."""
        agents = self._reports.agents
        if abs(agents - self._agents_told) > _MANY * min(agents, self._agents_told):
            self._agents_told = agents
            self._agenda.touch(capture.metadata.uid for capture in self._captures.objects.values())

    def _note(self, changed: Changed, now: datetime) -> None:
        self._agenda.touch(changed.states)
        for uid in changed.numbers:
            self._agenda.schedule(uid, min(self._written_at.get(uid, now), now) + self._counters_interval)

    async def _pass(self) -> float:
        """Bring what is due up to date; returns the seconds until time alone changes something."""
        now = self._clock()
        if self._passed_at is not None and now < self._passed_at:
            self._admissions_until = None  # the clock was set back: what ended may not have
        self._passed_at = now
        known = self._newest()
        self._note(self._reports.listen(now), now)
        self._count_agents()
        self._admit(known, now)
        for uid in self._agenda.take(known.keys(), now):
            capture = known[uid]
            try:
                for moment in await self._attend(capture, now):
                    if moment > now:
                        self._agenda.schedule(uid, moment)
            except StatusError as error:
                if error.code not in (404, 409):  # it changed or went meanwhile: the cache will tell
                    _log.warning("%s: %s", _named(capture), error.message)
                self._agenda.schedule(uid, now + _RETRY)
        return self._agenda.pause(now, longest=_LONGEST_PAUSE)

    def _admit(self, known: Mapping[str, Known], now: datetime) -> None:
        """Decide who may run, when a capture changed or one came to its end; those concerned are looked at."""
        if self._admissions_until is not None and now < self._admissions_until:
            return
        captures = [capture for capture in known.values() if isinstance(capture, PacketCapture)]
        # The leader remembers whom it admitted: its cache may be behind its own writes.
        if self._admitted is None:
            self._admitted = {capture.metadata.uid for capture in captures if _is_admitted(capture)}
        before, self._admissions = self._admissions, admit(captures, already=self._admitted, now=now)
        self._admitted = {uid for uid, admission in self._admissions.items() if admission.admitted}
        self._agenda.touch(uid for uid, admission in self._admissions.items() if admission != before.get(uid))
        ends = [admission.ends for admission in self._admissions.values() if admission.ends and admission.ends > now]
        self._admissions_until = min(ends, default=datetime.max.replace(tzinfo=UTC))

    def _newest(self) -> dict[str, Known]:
        """The captures as we last wrote them, where the cache is still behind that."""
        cached = {capture.metadata.uid: capture for capture in self._captures.objects.values()}
        self._written = {
            uid: written
            for uid, written in self._written.items()
            if uid in cached and _version(cached[uid]) < _version(written)
        }
        self._written_at = {uid: moment for uid, moment in self._written_at.items() if uid in cached}
        self._headlines = {uid: left for uid, left in self._headlines.items() if uid in cached}
        self._reports.retain(cached.keys())
        return cached | self._written

    async def _attend(self, capture: Known, now: datetime) -> list[datetime]:
        """Do what is due for a capture; returns the moments at which there may be something to do again."""
        metadata = capture.metadata
        if isinstance(capture, Unreadable):
            status = unreadable(capture.status, message=capture.message, generation=metadata.generation, now=now)
            return await self._write(capture, status, now)
        admission = self._admissions[metadata.uid]
        going = goes_at(capture, admission)
        if going is not None and going <= now:
            await self._delete(capture)
            return []
        status = summarize(
            capture,
            admission,
            self._reports.of(metadata, capture.status.nodes),
            agents=self._reports.agents,
            gone=self._reports.gone(metadata, capture.status.nodes),
            now=now,
        )
        settles = settles_at(capture.status, admission, agents=self._reports.agents, now=now)
        moments = [capture.spec.start_time, admission.ends, going, settles]
        return [moment for moment in moments if moment is not None] + await self._write(capture, status, now)

    async def _write(self, capture: Known, status: PacketCaptureStatus, now: datetime) -> list[datetime]:
        """Write the status if that is due; else returns when it will be."""
        metadata, uid = capture.metadata, capture.metadata.uid
        spacing = self._reports.agents * _SPACING_PER_AGENT
        headline_spacing = max(_HEADLINE_SPACING, spacing)
        headlines = self._headlines.get(uid, Headlines(now))
        due = write_at(
            capture.status,
            status,
            last=self._last_written(capture),
            headline_at=headlines.next(headline_spacing, now),
            spacing=spacing,
            counters_interval=self._counters_interval,
            now=now,
        )
        if due is None:
            return []
        if due > now:
            return [due]
        try:
            written = await self._replace_status(metadata, status)
        except StatusError as error:
            if error.code != 422:
                raise
            _log.error("%s: its status is written without numbers: %s", _named(capture), error.message)
            status = without_numbers(status)
            written = await self._replace_status(metadata, status)
        self._written[uid] = written
        self._written_at[uid] = now
        if headline(status) != headline(capture.status):
            self._headlines[uid] = headlines.after(headline_spacing, now)
        if status.phase != capture.status.phase:
            capturing = status.condition("Capturing")
            reason = capturing.reason if capturing is not None else ""
            _log.info("%s is %s", _named(capture), status.phase, extra={"reason": reason})
        self._events.send(
            written.metadata, transitions(capture.status, status, started_by=started_by(written.metadata))
        )
        return []

    def _last_written(self, capture: Known) -> datetime | None:
        uid = capture.metadata.uid
        if uid in self._written_at or not capture.status.conditions:
            return self._written_at.get(uid)
        return first_written(uid, began=self._began, interval=self._counters_interval)

    async def _replace_status(self, metadata: ObjectMeta, status: PacketCaptureStatus) -> Known:
        body = {
            "apiVersion": PACKETCAPTURES.api_version,
            "kind": PACKETCAPTURES.kind,
            "metadata": {
                "name": metadata.name,
                "namespace": metadata.namespace,
                "uid": metadata.uid,
                "resourceVersion": metadata.resource_version,
            },
            "status": status.to_json(),
        }
        answer = await self._client.replace(
            PACKETCAPTURES, metadata.name, body, namespace=metadata.namespace, subresource="status"
        )
        return read(answer)

    async def _delete(self, capture: PacketCapture) -> None:
        metadata = capture.metadata
        if metadata.deletion_timestamp is not None:
            return
        await self._client.delete(PACKETCAPTURES, metadata.name, namespace=metadata.namespace, uid=metadata.uid)
        _log.info("%s has finished and its time to live is over: it is deleted", _named(capture))


def _is_admitted(capture: PacketCapture) -> bool:
    condition = capture.status.condition("Admitted")
    return condition is not None and condition.status == "True"


def _version(capture: Known) -> int:
    """Resource versions of one resource are ordered (Kubernetes 1.35 promises what held before)."""
    return int(capture.metadata.resource_version)


def _named(capture: Known) -> str:
    return f"capture {capture.metadata.namespace}/{capture.metadata.name}"
