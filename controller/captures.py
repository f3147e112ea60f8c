"""The leader's work on captures: it admits them, writes their status, which nobody else does, and deletes what is over.

Each pass looks at everything. A capture with which something is wrong is passed over, and logged; the others go on.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from pydantic import ValidationError

from api.capturenode import CaptureNode
from api.object import ObjectMeta, explain
from api.packetcapture import PacketCapture, PacketCaptureStatus
from controller.expiry import goes_at
from controller.quota import admit
from controller.summary import Report, outline, silent_since, summarize, unreadable
from kube.client import CAPTURENODES, PACKETCAPTURES, Client, Json
from kube.status import StatusError
from kube.watch import Cache, Signal

_log = logging.getLogger(__name__)

_RETRY = 5.0
_LONGEST_PAUSE = 30.0
"""Seconds; after that, silence of agents is noticed at the latest."""
_GATHER = 0.1
"""Seconds in which changes that come together become one pass."""
_REST = 3.0
"""Pauses for each second of computing, so that many reports of many nodes take a quarter of a core at most."""


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
    counters_interval: timedelta,
    now: datetime,
) -> datetime | None:
    """When the status is to be written, `last` being the last time that it was; None when there is nothing new.

    Every write reaches every agent, so what merely counts up waits.
    """
    if wanted.to_json() == written.to_json():
        return None
    if last is None or outline(wanted).to_json() != outline(written).to_json():
        return now
    return max(now, last + counters_interval)


class Captures:
    """Own `run` in a TaskGroup. `counters_interval` is the shortest time between two writes of mere counters."""

    def __init__(
        self,
        client: Client,
        *,
        counters_interval: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._counters_interval = counters_interval
        self._clock = clock
        self._signal = Signal()
        self._captures = Cache(client, PACKETCAPTURES, read, on_change=lambda _: self._signal.set())
        self._nodes = Cache(client, CAPTURENODES, CaptureNode.model_validate, on_change=lambda _: self._signal.set())
        self._admitted: set[str] | None = None
        self._written: dict[str, Known] = {}
        self._written_at: dict[str, datetime] = {}

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

    async def _pass(self) -> float:
        """Bring every status up to date; returns the seconds until time alone changes something."""
        now = self._clock().replace(microsecond=0)
        known = self._newest()
        captures = [capture for capture in known if isinstance(capture, PacketCapture)]
        # The leader remembers whom it admitted: its cache may be behind its own writes.
        if self._admitted is None:
            self._admitted = {capture.metadata.uid for capture in captures if _is_admitted(capture)}
        admissions = admit(captures, already=self._admitted, now=now)
        self._admitted = {uid for uid, admission in admissions.items() if admission.admitted}
        reports, agents = self._reports(now)
        moments = [now + timedelta(seconds=_LONGEST_PAUSE)]
        for capture in known:
            uid = capture.metadata.uid
            try:
                if isinstance(capture, Unreadable):
                    status = unreadable(
                        capture.status, message=capture.message, generation=capture.metadata.generation, now=now
                    )
                else:
                    admission = admissions[uid]
                    going = goes_at(capture, admission)
                    if going is not None and going <= now:
                        await self._delete(capture)
                        continue
                    moments += [moment for moment in (capture.spec.start_time, admission.ends, going) if moment]
                    status = summarize(capture, admission, reports[uid], agents=agents, now=now)
                if (again_at := await self._write(capture, status, now)) is not None:
                    moments.append(again_at)
            except StatusError as error:
                if error.code not in (404, 409):  # it changed or went meanwhile: the cache will tell
                    _log.warning("%s: %s", _named(capture), error.message)
                moments.append(now + timedelta(seconds=_RETRY))
        return min((moment - now).total_seconds() for moment in moments if moment > now)

    def _newest(self) -> list[Known]:
        """The captures as we last wrote them, where the cache is still behind that."""
        cached = {capture.metadata.uid: capture for capture in self._captures.objects.values()}
        self._written = {
            uid: written
            for uid, written in self._written.items()
            if uid in cached and _version(cached[uid]) < _version(written)
        }
        self._written_at = {uid: moment for uid, moment in self._written_at.items() if uid in cached}
        return list((cached | self._written).values())

    def _reports(self, now: datetime) -> tuple[defaultdict[str, list[Report]], int]:
        """What nodes say, by the capture's UID; and how many agents speak."""
        reports: defaultdict[str, list[Report]] = defaultdict(list)
        agents = 0
        for node in self._nodes.objects.values():
            silent = silent_since(node, now)
            agents += silent is None
            for said in node.status.captures:
                reports[said.uid].append(Report(node.metadata.name, said, silent))
        return reports, agents

    async def _write(self, capture: Known, status: PacketCaptureStatus, now: datetime) -> datetime | None:
        """Write the status if that is due; else returns when it will be."""
        metadata, uid = capture.metadata, capture.metadata.uid
        last = self._written_at.get(uid)
        due = write_at(capture.status, status, last=last, counters_interval=self._counters_interval, now=now)
        if due is None or due > now:
            return due
        body = {
            "apiVersion": PACKETCAPTURES.api_version,
            "kind": PACKETCAPTURES.kind,
            "metadata": {
                "name": metadata.name,
                "namespace": metadata.namespace,
                "uid": uid,
                "resourceVersion": metadata.resource_version,
            },
            "status": status.to_json(),
        }
        answer = await self._client.replace(
            PACKETCAPTURES, metadata.name, body, namespace=metadata.namespace, subresource="status"
        )
        self._written[uid] = read(answer)
        self._written_at[uid] = now
        if status.phase != capture.status.phase:
            _log.info("%s is %s", _named(capture), status.phase, extra={"reason": status.conditions[-1].reason})
        return None

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
