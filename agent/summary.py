"""What this node says of each capture: its plan, what the capturer makes of it, and its files, put into one state."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agent.capturer.protocol import State, TargetStatus
from agent.reconcile import CapturePlan, Verdict
from api.capturenode import LONGEST_MESSAGE, NodeCapture

_LONGEST_REASON = 128


@dataclass(slots=True)
class Count:
    """Packets written, and those that passed the filter and were lost."""

    packets: int = 0
    dropped: int = 0


class Tally:
    """What the runs that are over have counted, by the capture's UID.

    Together with the runs that go on these are a capture's counters. They begin anew, at what is in finished files,
    when the agent does.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Count] = {}

    def add(self, capture_uid: str, *, packets: int, dropped: int = 0) -> None:
        count = self._counts.setdefault(capture_uid, Count())
        count.packets += packets
        count.dropped += dropped

    def add_run(self, status: TargetStatus) -> None:
        """A run has ended with this status."""
        for interface in status.interfaces:
            self.add(status.target.capture_uid, packets=interface.packets, dropped=interface.dropped)

    def total(self, capture_uid: str, running: Iterable[TargetStatus]) -> Count:
        """The capture's counters now."""
        kept = self._counts.get(capture_uid, Count())
        total = Count(kept.packets, kept.dropped)
        for status in running:
            if status.target.capture_uid == capture_uid:
                total.packets += sum(interface.packets for interface in status.interfaces)
                total.dropped += sum(interface.dropped for interface in status.interfaces)
        return total

    def forget(self, capture_uid: str) -> None:
        self._counts.pop(capture_uid, None)


@dataclass(frozen=True, slots=True)
class Files:
    """How many files of a capture lie on this node, and their size in bytes."""

    count: int = 0
    size: int = 0


def summarize(
    plan: CapturePlan, *, status: Callable[[str], TargetStatus | None], count: Count, files: Files
) -> NodeCapture | None:
    """The capture as seen from this node; None when it does not concern it: no pod of it here, and no file."""
    if not plan.matched and not files.count:
        return None
    statuses = [known for target in plan.targets if (known := status(target.id)) is not None]
    verdict = _verdict(plan, statuses, count)
    metadata = plan.capture.metadata
    return NodeCapture(
        namespace=metadata.namespace or "",
        name=metadata.name,
        uid=metadata.uid,
        state=verdict.state,
        reason=_clamp(verdict.reason, _LONGEST_REASON),
        message=_clamp(verdict.message, LONGEST_MESSAGE),
        pods=_capturing(statuses),
        files=files.count,
        packets=count.packets,
        bytes=files.size,
        dropped=count.dropped,
    )


def _capturing(statuses: list[TargetStatus]) -> int:
    return sum(status.state is State.CAPTURING for status in statuses)


def _verdict(plan: CapturePlan, statuses: list[TargetStatus], count: Count) -> Verdict:
    if not plan.targets:
        return plan.verdict or Verdict("WaitingForTraffic", "NoPodMatches", "no pod of this node matches any more")
    trouble = plan.verdict if plan.verdict is not None and plan.verdict.state == "Error" else None
    for status in statuses:
        if status.state is State.FAILED and status.target.id not in plan.ending:
            trouble = Verdict("Error", status.reason, f"pod {status.target.pod_name}: {status.message}")
    if capturing := _capturing(statuses):
        state = Verdict("Capturing") if count.packets else _NOTHING_YET
        if trouble is None:
            return state
        return Verdict(state.state, trouble.reason, f"{capturing} of {plan.matched} pods; {trouble.message}")
    return trouble or _STARTING


_STARTING = Verdict("WaitingForTraffic", "Starting", "the capture is being started")
_NOTHING_YET = Verdict("WaitingForTraffic", "NoPacketYet", "no packet of these pods has passed the filter yet")


def _clamp(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
