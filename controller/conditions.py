"""What can be said of a capture as a whole, each with a reason for programs and a sentence that a person can act on.

Messages name counts and nodes, the worst first and few of them: a capture may be on a thousand nodes.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from api.object import Condition
from controller.reports import Said

_REASONS_TOLD = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition's value."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def pods_matched(nodes: Sequence[Said], *, agents: int, settled: bool, namespace: str | None) -> Finding:
    """Whether there is any pod to capture. Agents that have none say nothing, so they are given time till `settled`."""
    matching = [node for node in nodes if node.matched]
    if matching:
        count = sum(node.matched for node in matching)
        verb = "matches" if count == 1 else "match"
        return Finding("True", "PodsMatch", f"{counted(count, 'pod')} {verb} on {counted(len(matching), 'node')}")
    if not agents:
        return Finding("Unknown", "NoAgent", NO_AGENT)
    if not settled:
        return Finding("Unknown", "Starting", STARTING)
    return Finding("False", "NoPodMatches", no_pod_matches(namespace))


def complete(nodes: Sequence[Said], previous: Condition | None, *, gone: Collection[str], max_files: int) -> Finding:
    """Whether every packet that passed the filter is in a file. What was lost stays lost, whatever comes later.

    `gone` are nodes that are no more and that had packets. Where a node is in trouble or silent nobody knows.
    """
    losses = _losses(nodes, gone)
    if losses:
        return Finding("False", losses[0][0], "; ".join(told for _, told in losses))
    if previous is not None and previous.status == "False":
        return Finding(previous.status, previous.reason, previous.message)
    if not any(node.packets for node in nodes) and (previous is None or previous.status != "True"):
        return Finding("Unknown", "NoPacketYet", "no packet has been captured yet")
    if troubled := [node for node in nodes if node.troubled]:
        return Finding("Unknown", "NodesInTrouble", f"it is not known what was lost {told(troubled)}")
    kept = counted(max_files, "file")
    return Finding("True", "AllPacketsKept", f"no packet was lost; rotation keeps the newest {kept} of each interface")


def disk_pressure(nodes: Sequence[Said]) -> Finding:
    """Whether capturing pauses anywhere for want of room."""
    pressed = sorted(node for node in nodes if node.reason == "DiskPressure")
    if pressed:
        return Finding("True", "DiskPressure", f"{on(pressed)}: {pressed[0].message}")
    return Finding("False", "DiskHasRoom", "no node has to pause for want of room on its disk")


def degraded(nodes: Sequence[Said]) -> Finding:
    """Whether something is not captured that should be; the worst reason is that which stops a node altogether."""
    troubled = [node for node in nodes if node.troubled]
    if not troubled:
        return Finding("False", "AsExpected", "every node does what it should")
    return Finding("True", worst_reason(troubled), told(troubled))


def worst_reason(troubled: Sequence[Said]) -> str:
    return _by_reason(troubled)[0][0]


def told(troubled: Sequence[Said]) -> str:
    """Each kind of trouble once, with the first node that has it."""
    groups = _by_reason(troubled)
    parts = [f"{on(nodes)}: {nodes[0].message or reason}" for reason, nodes in groups[:_REASONS_TOLD]]
    if len(groups) > _REASONS_TOLD:
        parts.append(f"and {counted(len(groups) - _REASONS_TOLD, 'other reason')}")
    return "; ".join(parts)


def no_pod_matches(namespace: str | None) -> str:
    return f"no pod in namespace {namespace} that the selector matches runs now; those that come later are captured"


NOT_RUNNING = Finding("False", "NotRunning", "it is not to capture anything now")
NO_AGENT = "no agent has reported: see the DaemonSet kubepcap-agent and its pods"
STARTING = "the nodes' agents are about to begin"


def on(nodes: Sequence[Said]) -> str:
    """`on node a and 2 more nodes`, the first by name so that the words stay the same."""
    first, more = min(node.node for node in nodes), len(nodes) - 1
    return f"on node {first} and {counted(more, 'more node')}" if more else f"on node {first}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _losses(nodes: Sequence[Said], gone: Collection[str]) -> list[tuple[str, str]]:
    """What was lost, as reason and message, the worst first: whole nodes, files, times, then counted packets."""
    losses = []
    if gone:
        first, more = min(gone), len(gone) - 1
        named = f"node {first} and {counted(more, 'more node')}" if more else f"node {first}"
        losses.append(("NodeGone", f"{named} no longer {'exist' if more else 'exists'}, and what was captured there"))
    if evicting := [node for node in nodes if node.evicted]:
        count = sum(node.evicted for node in evicting)
        verb = "was" if count == 1 else "were"
        losses.append(
            ("FilesEvicted", f"{counted(count, 'file')} {verb} removed to keep the disk's limits {on(evicting)}")
        )
    if interrupted := [node for node in nodes if node.interruptions]:
        count = sum(node.interruptions for node in interrupted)
        losses.append(
            (
                "Interrupted",
                f"capturing was interrupted {counted(count, 'time')} {on(interrupted)}: "
                "what came until it went on is in no file",
            )
        )
    if dropping := [node for node in nodes if node.dropped]:
        count = sum(node.dropped for node in dropping)
        verb = "was" if count == 1 else "were"
        losses.append(
            (
                "PacketsDropped",
                f"{counted(count, 'packet')} {verb} lost {on(dropping)}: a narrower filter, a smaller snapLength or "
                "a policy with a larger ringSize helps",
            )
        )
    return losses


def _by_reason(troubled: Sequence[Said]) -> list[tuple[str, list[Said]]]:
    """The nodes by reason: what stops a node first, then what concerns most nodes."""
    stopping = {_reason(node) for node in troubled if node.failed}
    counts = Counter(_reason(node) for node in troubled)
    ordered = sorted(counts, key=lambda reason: (reason not in stopping, -counts[reason], reason))
    return [(reason, sorted(node for node in troubled if _reason(node) == reason)) for reason in ordered]


def _reason(node: Said) -> str:
    return node.reason or "NodeFailed"
