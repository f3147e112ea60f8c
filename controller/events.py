"""Events of captures, for `kubectl describe`: what changed for a capture as a whole, once, on however many nodes it is.

What is told follows from the status as it was written before and as it is now, so a new leader tells nothing again. An
event that can't be written is logged and lost: the status has it all.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Literal, NoReturn

from api import stamp
from api.object import Condition, ObjectMeta, format_timestamp
from api.packetcapture import PacketCaptureStatus
from api.stamp import StampError
from kube.client import EVENTS, PACKETCAPTURES, Client, Json
from kube.status import StatusError

_log = logging.getLogger(__name__)

CONTROLLER = "kubepcap.io/controller"
BURST = 25
"""Events of one capture that may come together, and"""
REFILL = 300.0
"""seconds after which one more may come, as with client-go's spam filter."""
BURST_OF_ALL = 200
"""Events of all captures that may come together, and"""
REFILL_OF_ALL = 0.2
"""seconds after which one more may come: what one node says may concern all captures."""
_LONGEST_QUEUE = 1000
_LONGEST_NOTE = 1024
_LONGEST_REASON = 128
"""Bytes of UTF-8, as kube-apiserver counts them."""
_LONGEST_NAME = 253

_UNREADY = {"SpecUnreadable", "NotStamped", "StampUnreadable", "StampForeign", "StampOutdated"}


@dataclass(frozen=True, slots=True)
class Transition:
    """Something to tell: `Warning` for what a person may have to act on."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


def transitions(before: PacketCaptureStatus, after: PacketCaptureStatus, *, started_by: str) -> list[Transition]:
    """What is to be told when the status goes from `before` to `after`."""
    return [*_stages(before, after, started_by), *_troubles(before, after)]


def started_by(metadata: ObjectMeta) -> str:
    """Who answers for the capture, by its stamp."""
    try:
        given = stamp.read(metadata.annotations)
    except StampError:
        given = None
    return f"user {given.user}, policy {given.policy}" if given is not None else "an unknown user"


def _stages(before: PacketCaptureStatus, after: PacketCaptureStatus, started_by: str) -> Iterator[Transition]:
    was, now = _stage(before), _stage(after)
    if now in (was, "Deleted"):
        return
    admitted = after.condition("Admitted")
    message = admitted.message if admitted is not None else ""
    if now == "Refused":
        yield Transition("Warning", admitted.reason if admitted else "Refused", "Admitting", message)
    elif now == "Queued":
        yield Transition("Warning", "QuotaExceeded", "Admitting", message)
    elif now == "Suspended":
        yield Transition("Normal", "Suspended", "Stopping", message)
    elif now == "Finished":
        yield Transition("Normal", "Finished", "Stopping", message)
    elif was == "Suspended":
        yield Transition("Normal", "Resumed", "Starting", f"it goes on: {started_by}")
    elif now == "Running":
        yield Transition("Normal", "Started", "Starting", f"started by {started_by}")


def _stage(status: PacketCaptureStatus) -> str:
    """How far a capture has come, by what is written of it. It runs from its start on, also before a node tells so."""
    admitted, capturing = status.condition("Admitted"), status.condition("Capturing")
    if admitted is None:
        return "New"
    if admitted.reason in _UNREADY:
        return "Refused"
    if admitted.reason == "QuotaExceeded":
        return "Queued"
    if admitted.reason in ("Suspended", "Deleted"):
        return admitted.reason
    if status.phase == "Finished":
        return "Finished"
    return "Scheduled" if capturing is not None and capturing.reason == "BeforeStartTime" else "Running"


def _troubles(before: PacketCaptureStatus, after: PacketCaptureStatus) -> Iterator[Transition]:
    if after.interruptions > before.interruptions:
        complete = after.condition("Complete")
        yield Transition("Warning", "Interrupted", "Capturing", complete.message if complete else "")
    lost = _entered(before, after, "Complete", "False")
    if lost is not None and lost.reason != "Interrupted":
        yield Transition("Warning", lost.reason, "Capturing", lost.message)
    pressed = _entered(before, after, "DiskPressure", "True")
    if pressed is not None:
        yield Transition("Warning", "DiskPressure", "Capturing", pressed.message)
    degraded = _entered(before, after, "Degraded", "True")
    if degraded is not None and degraded.reason != "DiskPressure":
        yield Transition("Warning", degraded.reason, "Capturing", degraded.message)
    if (relieved := _left(before, after, "DiskPressure", "True")) is not None:
        yield Transition("Normal", "DiskHasRoom", "Capturing", relieved.message)
    elif (recovered := _left(before, after, "Degraded", "True")) is not None:
        yield Transition("Normal", "Recovered", "Capturing", recovered.message)


def _entered(before: PacketCaptureStatus, after: PacketCaptureStatus, kind: str, status: str) -> Condition | None:
    """The condition when it came to have this status, or has it for another reason."""
    old, new = before.condition(kind), after.condition(kind)
    if new is None or new.status != status:
        return None
    return None if old is not None and (old.status, old.reason) == (status, new.reason) else new


def _left(before: PacketCaptureStatus, after: PacketCaptureStatus, kind: str, status: str) -> Condition | None:
    """The condition when it no longer has this status, but for a capture that has stopped."""
    old, new = before.condition(kind), after.condition(kind)
    if old is None or new is None or old.status != status or new.status == status or new.reason == "NotRunning":
        return None
    return new


def event(regarding: ObjectMeta, told: Transition, *, instance: str, now: datetime) -> Json:
    """`events.k8s.io/v1 Event`. Its name is that of the change, so that it can't be told twice."""
    change = f"{regarding.uid} {regarding.resource_version} {told.reason} {told.note}"
    suffix = sha256(change.encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {
            "name": f"{regarding.name[: _LONGEST_NAME - len(suffix) - 1].rstrip('.-')}.{suffix}",
            "namespace": regarding.namespace,
        },
        "eventTime": f"{format_timestamp(now)[:-1]}.{now.microsecond:06d}Z",
        "type": told.type,
        "reason": _cut(told.reason, _LONGEST_REASON),
        "action": told.action,
        "note": _cut(told.note, _LONGEST_NOTE),
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
        "regarding": {
            "apiVersion": PACKETCAPTURES.api_version,
            "kind": PACKETCAPTURES.kind,
            "namespace": regarding.namespace,
            "name": regarding.name,
            "uid": regarding.uid,
            "resourceVersion": regarding.resource_version,
        },
    }


def _cut(text: str, size: int) -> str:
    """The text, at most so many bytes of UTF-8 of it."""
    encoded = text.encode()
    if len(encoded) <= size:
        return text
    ellipsis = "…"
    return encoded[: size - len(ellipsis.encode())].decode(errors="ignore") + ellipsis


class Allowance:
    """How many events each may still have: a bucket of `burst`, one more every `refill` seconds."""

    def __init__(self, burst: int = BURST, refill: float = REFILL) -> None:
        self._burst = float(burst)
        self._refill = refill
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, uid: str, now: float) -> bool:
        """Whether there may be one more; `now` in seconds of a clock that is never set."""
        self._forget(now)
        left, since = self._left.get(uid, (self._burst, now))
        left = min(self._burst, left + (now - since) / self._refill)
        allowed = left >= 1
        self._left[uid] = (left - allowed, now)
        return allowed

    def _forget(self, now: float) -> None:
        """Buckets that are full again, once there are many."""
        if len(self._left) > _LONGEST_QUEUE:
            self._left = {
                uid: (left, since)
                for uid, (left, since) in self._left.items()
                if left + (now - since) / self._refill < self._burst
            }


class Events:
    """Writes events behind the leader's back: `send` never waits. Own `run` in a TaskGroup; `instance` is our pod."""

    def __init__(
        self,
        client: Client,
        *,
        instance: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._instance = instance
        self._clock = clock
        self._queue: asyncio.Queue[Json] = asyncio.Queue(_LONGEST_QUEUE)
        self._allowance = Allowance()
        self._allowance_of_all = Allowance(BURST_OF_ALL, REFILL_OF_ALL)

    def send(self, regarding: ObjectMeta, told: Sequence[Transition]) -> None:
        """Tell this of the capture, soon."""
        for one in told:
            named = f"event {one.reason} of capture {regarding.namespace}/{regarding.name}"
            now = asyncio.get_running_loop().time()
            if not self._allowance.take(regarding.uid, now):
                _log.info("%s is left out: the capture has had too many", named)
                continue
            if not self._allowance_of_all.take("", now):
                _log.warning("%s is left out: all captures together have had too many", named)
                continue
            try:
                self._queue.put_nowait(event(regarding, one, instance=self._instance, now=self._clock()))
            except asyncio.QueueFull:
                _log.warning("%s is lost: too many wait to be written", named)

    async def run(self) -> NoReturn:
        while True:
            body = await self._queue.get()
            metadata = body["metadata"]
            try:
                await self._client.create(EVENTS, body, namespace=metadata["namespace"])
            except StatusError as error:
                # Refused in a namespace that is going; known already when a leader before us told it.
                level = logging.INFO if error.code in (403, 404, 409) else logging.WARNING
                _log.log(
                    level, "event %s/%s is not written: %s", metadata["namespace"], metadata["name"], error.message
                )
