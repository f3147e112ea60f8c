"""What this node says of each capture: its plan, what the capturer makes of it, and its files, put into one state."""

from collections.abc import Callable
from dataclasses import dataclass

from agent.capturer.protocol import State, TargetStatus
from agent.reconcile import CapturePlan, Verdict
from agent.tally import Count, Counters
from api.capturenode import LONGEST_MESSAGE, REASON, NodeCapture

FILTER_MATCHED_NOTHING = "FilterMatchedNothing"
"""The reason whose message changes with every packet."""


@dataclass(frozen=True, slots=True)
class Files:
    """How many files of a capture lie on this node, and their size in bytes."""

    count: int = 0
    size: int = 0


def summarize(
    plan: CapturePlan, *, status: Callable[[str], TargetStatus | None], counters: Counters, files: Files
) -> NodeCapture | None:
    """The capture as seen from this node; None when it does not concern it: nothing to capture here, and no file.

    What is held back matches no pod. So captures that wait for their turn, however many, cost no room in the report.
    """
    count = counters.total
    if not plan.matched and not files.count and not count.packets and not counters.interruptions:
        return None
    statuses = [known for target in plan.targets if (known := status(target.id)) is not None]
    verdict = _verdict(plan, statuses, count)
    metadata = plan.capture.metadata
    return NodeCapture(
        namespace=metadata.namespace or "",
        name=metadata.name,
        uid=metadata.uid,
        state=verdict.state,
        reason=_word(verdict.reason),
        message=_clamp(verdict.message, LONGEST_MESSAGE),
        pods=_capturing(statuses),
        files=files.count,
        packets=count.packets,
        bytes=files.size,
        dropped=count.dropped,
        matched=plan.matched,
        seen=count.seen,
        evicted=counters.evicted,
        interruptions=counters.interruptions,
        interrupted_at=counters.interrupted_at,
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
        state = Verdict("Capturing") if count.packets else _nothing_yet(count.seen, capturing)
        if trouble is None:
            return state
        return Verdict(state.state, trouble.reason, f"{capturing} of {plan.matched} pods; {trouble.message}")
    return trouble or _STARTING


_STARTING = Verdict("WaitingForTraffic", "Starting", "the capture is being started")
_NO_PACKET = Verdict("WaitingForTraffic", "NoPacketYet", "no packet of these pods has been seen yet")


def _nothing_yet(seen: int, pods: int) -> Verdict:
    if not seen:
        return _NO_PACKET
    message = f"filter matched 0 of {seen:,} packets seen on {pods} pod{'s' if pods != 1 else ''}"
    return Verdict("WaitingForTraffic", FILTER_MATCHED_NOTHING, message)


def _word(reason: str) -> str:
    """A reason as it may be reported. The capturer's are trusted, but not so far that one of them ends the agent."""
    return reason if not reason or REASON.fullmatch(reason) else "Other"


def _clamp(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
