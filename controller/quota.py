"""Which captures may run now: as many of one policy in one namespace, and of one user, as the policy allows.

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
    """Decide for all captures, by UID. Those `already` admitted (UIDs) come first, then the oldest.

    One that is admitted stays so unless a limit is passed by a change to stamps: one with another user or policy,
    or with tighter limits, is counted under them, and the youngest that no longer fits waits again.
    """
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
    active = _Active()
    left: list[tuple[PacketCapture, stamp.Stamp, datetime | None]] = []
    for capture, given, ends in sorted(waiting, key=lambda entry: _order(entry[0], already)):
        if active.obstacle(given) is not None:
            left.append((capture, given, ends))
            continue
        active.add(capture.metadata.name, given)
        decided[capture.metadata.uid] = Admission(
            admitted=True, reason="WithinLimit", message=f"policy {given.policy} allows it", ends=ends
        )
    for capture, given, ends in left:  # what they wait for is known when all are counted
        obstacle = active.obstacle(given) or ""
        decided[capture.metadata.uid] = Admission(admitted=False, reason="QuotaExceeded", message=obstacle, ends=ends)
    return decided


class _Active:
    """The names of the captures that are admitted, as each limit counts them."""

    def __init__(self) -> None:
        self._of_namespace: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self._of_user: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)

    def add(self, name: str, given: stamp.Stamp) -> None:
        self._of_namespace[given.policy, given.namespace].append(name)
        self._of_user[given.policy, given.user].append((given.namespace, name))

    def obstacle(self, given: stamp.Stamp) -> str | None:
        """Why one more can't be admitted, and what it waits for; None when it can be.

        Who sees the capture may know nothing of other namespaces, so those there are not named.
        """
        others = self._of_namespace[given.policy, given.namespace]
        limit = given.limits.max_captures_per_namespace
        if len(others) >= limit:
            return (
                f"policy {given.policy} allows {limit} active at once in namespace {given.namespace}: "
                f"it waits until one of them ({_named(others)}) ends, is suspended or is deleted"
            )
        theirs = self._of_user[given.policy, given.user]
        most = given.limits.max_captures_per_user
        if most is not None and len(theirs) >= most:
            here = [name for namespace, name in theirs if namespace == given.namespace]
            elsewhere = ["others elsewhere"] if len(here) < len(theirs) else []
            which = ", ".join(filter(None, [_named(here), *elsewhere]))
            return (
                f"policy {given.policy} allows {most} active at once of user {given.user}: "
                f"it waits until one of them ({which}) ends, is suspended or is deleted"
            )
        return None


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


def _named(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_NAMED]) + (", …" if len(names) > _NAMED else "")
