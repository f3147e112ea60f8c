"""What the status of a capture says: one account of what all nodes report, and why nothing comes when nothing does."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from api.capturenode import CaptureNode, NodeCapture
from api.object import Condition, format_timestamp
from api.packetcapture import NodeSummary, PacketCapture, PacketCaptureStatus, Phase
from controller.quota import Admission

LONGEST_LIST = 100
SILENT_AFTER = timedelta(minutes=2)
"""Without a word for so long, a node's agent is taken to be away; agents speak at least every 30 seconds."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one node says of one capture; `silent_since` is set when its agent is away."""

    node: str
    said: NodeCapture
    silent_since: datetime | None = None

    @property
    def summary(self) -> NodeSummary:
        said = self.said
        state, reason, message = said.state, said.reason, said.message
        if self.silent_since is not None and state != "Finished":
            state, reason = "Error", "AgentSilent"
            message = f"the node's agent has said nothing since {format_timestamp(self.silent_since)}"
        return NodeSummary(
            node=self.node,
            state=state,
            reason=reason,
            message=message,
            pods=said.pods if self.silent_since is None else 0,
            packets=said.packets,
            bytes=said.bytes,
            dropped=said.dropped,
        )


@dataclass(frozen=True, slots=True)
class _State:
    """Where a capture stands as a whole; `runs` when packets that come now are taken."""

    phase: Phase
    reason: str
    message: str
    runs: bool = False


def silent_since(node: CaptureNode, now: datetime) -> datetime | None:
    """Since when the node's agent is away; None while it speaks."""
    heard = node.status.heartbeat_time or node.metadata.creation_timestamp
    return heard if heard is not None and heard + SILENT_AFTER <= now else None


def summarize(
    capture: PacketCapture,
    admission: Admission,
    reports: Sequence[Report],
    *,
    agents: int,
    now: datetime,
) -> PacketCaptureStatus:
    """The status as it should be now; `agents` is the number of nodes whose agent speaks."""
    nodes = sorted((report.summary for report in reports), key=_troubled_first)
    state = _state(capture, admission, nodes, agents=agents, now=now)
    previous = capture.status
    conditions = [
        _condition(
            previous.condition("Admitted"),
            kind="Admitted",
            holds=admission.admitted,
            reason=admission.reason,
            message=admission.message,
            generation=capture.metadata.generation,
            now=now,
        ),
        _condition(
            previous.condition("Capturing"),
            kind="Capturing",
            holds=state.runs,
            reason=state.reason,
            message=state.message,
            generation=capture.metadata.generation,
            now=now,
        ),
    ]
    return PacketCaptureStatus(
        phase=state.phase,
        conditions=conditions,
        pods=sum(node.pods for node in nodes),
        packets=sum(node.packets for node in nodes),
        bytes=sum(node.bytes for node in nodes),
        dropped=sum(node.dropped for node in nodes),
        finished_time=admission.ends if admission.has_ended(now) else None,
        nodes=nodes[:LONGEST_LIST],
        more_nodes=max(0, len(nodes) - LONGEST_LIST),
    )


def unreadable(previous: PacketCaptureStatus, *, message: str, generation: int, now: datetime) -> PacketCaptureStatus:
    """The status of a capture whose spec can't be read, as can happen to one made while no webhook stood guard."""
    conditions = [
        _condition(
            previous.condition(kind),
            kind=kind,
            holds=False,
            reason="SpecUnreadable",
            message=message,
            generation=generation,
            now=now,
        )
        for kind in ("Admitted", "Capturing")
    ]
    return previous.model_copy(update={"phase": "Error", "conditions": conditions})


def outline(status: PacketCaptureStatus) -> PacketCaptureStatus:
    """The status without what merely counts up: when this changes, it is worth telling everyone at once."""
    still = {"packets": 0, "bytes": 0, "dropped": 0}
    nodes = [node.model_copy(update=still) for node in status.nodes]
    return status.model_copy(update={**still, "nodes": nodes})


def _state(
    capture: PacketCapture, admission: Admission, nodes: Sequence[NodeSummary], *, agents: int, now: datetime
) -> _State:
    if not admission.is_obeyable:
        return _State("Error", admission.reason, admission.message)
    if admission.has_ended(now):
        return _State("Finished", admission.reason, admission.message)
    if not admission.admitted:
        return _State("Scheduled", admission.reason, admission.message)
    start = capture.spec.start_time
    if start is not None and start > now:
        return _State("Scheduled", "BeforeStartTime", f"it starts at {format_timestamp(start)}")
    return _running(capture, nodes, agents=agents)


def _running(capture: PacketCapture, nodes: Sequence[NodeSummary], *, agents: int) -> _State:
    """The state of a capture that should be running: what goes best decides, and trouble elsewhere is told with it."""
    troubled = [node for node in nodes if node.state == "Error"]
    capturing = [node for node in nodes if node.state == "Capturing"]
    if capturing:
        pods = sum(node.pods for node in capturing)
        return _State("Capturing", "Capturing", _with_trouble(_counted(pods, capturing), troubled), runs=True)
    waiting = [node for node in nodes if node.state == "WaitingForTraffic"]
    if waiting:
        pods = sum(node.pods for node in waiting)
        said = next((node for node in waiting if node.reason), waiting[0])
        message = said.message or f"{_counted(pods, waiting)}, and no packet has come yet"
        return _State(
            "WaitingForTraffic", said.reason or "NoPacketYet", _with_trouble(message, troubled), runs=pods > 0
        )
    if troubled:
        return _State("Error", troubled[0].reason or "NodeFailed", _told(troubled))
    if not agents:
        return _State("Scheduled", "NoAgent", "no agent has reported: see the DaemonSet kubepcap-agent and its pods")
    scheduled = [node for node in nodes if node.state == "Scheduled"]
    if scheduled:
        return _State("Scheduled", "Starting", "the nodes' agents are about to begin")
    message = (
        f"no pod in namespace {capture.metadata.namespace} that the selector matches runs now; "
        "those that come later are captured"
    )
    return _State("WaitingForTraffic", "NoPodMatches", message)


def _counted(pods: int, nodes: Sequence[NodeSummary]) -> str:
    return f"{pods} {'pod is' if pods == 1 else 'pods are'} captured on {len(nodes)} {_plural('node', len(nodes))}"


def _with_trouble(message: str, troubled: Sequence[NodeSummary]) -> str:
    return f"{message}; {_told(troubled)}" if troubled else message


def _told(troubled: Sequence[NodeSummary]) -> str:
    first, more = troubled[0], len(troubled) - 1
    told = f"on node {first.node}: {first.message or first.reason or 'an error without a message'}"
    return f"{told} (and on {more} more {_plural('node', more)})" if more else told


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _troubled_first(node: NodeSummary) -> tuple[bool, bool, str]:
    return node.state != "Error", node.dropped == 0, node.node


def _condition(
    previous: Condition | None,
    *,
    kind: str,
    holds: bool,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
) -> Condition:
    status: Literal["True", "False"] = "True" if holds else "False"
    since = previous.last_transition_time if previous is not None and previous.status == status else now
    return Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=since,
        observed_generation=generation,
    )
