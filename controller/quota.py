"""Which captures may run now: as many of one policy in one namespace as the policy allows.

A webhook can't count, since it doesn't see the other one that is created at the same moment. So the leader admits, and
agents wait for its word.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from api import stamp
from api.object import format_timestamp
from api.packetcapture import PacketCapture
from api.stamp import StampError

_NAMED = 3


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether agents may obey a capture now; the reason is one word, the message says what can be done.

    `ends` is when it ends at the latest, None when its stamp does not fit.
    """

    admitted: bool
    reason: str
    message: str
    ends: datetime | None = None
    is_obeyable: bool = True
    """Whether the stamp fits."""

    def has_ended(self, now: datetime) -> bool:
        return self.ends is not None and self.ends <= now


def admit(captures: Iterable[PacketCapture], *, already: Collection[str], now: datetime) -> Mapping[str, Admission]:
    """Decide for all captures, by UID. Those `already` admitted (UIDs) stay so, then the oldest come first."""
    decided: dict[str, Admission] = {}
    waiting: list[tuple[PacketCapture, stamp.Stamp, datetime | None]] = []
    for capture in captures:
        try:
            given = stamp.check(capture)
        except StampError as error:
            decided[capture.metadata.uid] = Admission(
                admitted=False, reason=error.reason, message=str(error), is_obeyable=False
            )
            continue
        ends = given.ends(capture)
        if (inactive := _inactive(capture, ends, now)) is not None:
            decided[capture.metadata.uid] = inactive
        else:
            waiting.append((capture, given, ends))
    active: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for capture, given, ends in sorted(waiting, key=lambda entry: _order(entry[0], already)):
        others = active[given.policy, given.namespace]
        decided[capture.metadata.uid] = _within_limit(given, others, ends)
        if decided[capture.metadata.uid].admitted:
            others.append(capture.metadata.name)
    return decided


def _inactive(capture: PacketCapture, ends: datetime | None, now: datetime) -> Admission | None:
    if capture.metadata.deletion_timestamp is not None:
        return Admission(admitted=False, reason="Deleted", message="it is being deleted", ends=ends)
    if ends is not None and ends <= now:
        return Admission(admitted=False, reason="Ended", message=f"it ended at {format_timestamp(ends)}", ends=ends)
    if capture.spec.suspend:
        message = "spec.suspend is true: it is stopped, and its files are kept"
        return Admission(admitted=False, reason="Suspended", message=message, ends=ends)
    return None


def _order(capture: PacketCapture, already: Collection[str]) -> tuple[bool, datetime, str]:
    metadata = capture.metadata
    return metadata.uid not in already, metadata.creation_timestamp or datetime.max.replace(tzinfo=UTC), metadata.uid


def _within_limit(given: stamp.Stamp, others: list[str], ends: datetime | None) -> Admission:
    limit = given.limits.max_captures_per_namespace
    if len(others) < limit:
        return Admission(admitted=True, reason="WithinLimit", message=f"policy {given.policy} allows it", ends=ends)
    named = ", ".join(sorted(others)[:_NAMED]) + (", …" if len(others) > _NAMED else "")
    message = (
        f"policy {given.policy} allows {limit} active at once in namespace {given.namespace}: "
        f"it waits until one of them ({named}) ends, is suspended or is deleted"
    )
    return Admission(admitted=False, reason="QuotaExceeded", message=message, ends=ends)
