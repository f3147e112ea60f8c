"""What the status of a capture says: one account of what all nodes report, and why nothing comes when nothing does."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from api.object import Condition, format_timestamp
from api.packetcapture import LARGEST_COUNT, NodeSummary, PacketCapture, PacketCaptureStatus, Phase
from controller import conditions
from controller.conditions import Finding, counted
from controller.quota import Admission
from controller.reports import Said

LONGEST_LIST = 25
"""Nodes named in a status; every agent gets each status that is written. All are in the CaptureNodes."""
SETTLING = timedelta(seconds=3)
"""After the admission; before it is over, that no node reports a pod does not mean that there is none."""
SETTLING_PER_AGENT = timedelta(milliseconds=10)
"""The more agents there are the longer it lasts, as they spread what all have to tell."""


@dataclass(frozen=True, slots=True)
class _State:
    """Where a capture stands as a whole; `runs` when packets that come now are taken."""

    phase: Phase
    reason: str
    message: str
    runs: bool = False


def summarize(
    capture: PacketCapture,
    admission: Admission,
    nodes: Sequence[Said],
    *,
    agents: int,
    gone: Collection[str] = (),
    now: datetime,
) -> PacketCaptureStatus:
    """The status as it should be now.

    `agents` is the number of nodes whose agent speaks, `gone` are nodes that are no more and had packets of it.
    """
    nodes = sorted(nodes, key=_troubled_first)
    admitted = Finding("True" if admission.admitted else "False", admission.reason, admission.message)
    settles = settles_at(capture.status, admission, agents=agents, now=now)
    settled = settles is None or settles <= now
    running = _is_running(capture, admission, now)
    state = _state(capture, admission, nodes, agents=agents, settled=settled, now=now)
    findings = {
        "Admitted": admitted,
        "Capturing": Finding("True" if state.runs else "False", state.reason, state.message),
        "PodsMatched": conditions.pods_matched(
            nodes, agents=agents, settled=settled, namespace=capture.metadata.namespace
        )
        if running
        else _frozen(capture.status.condition("PodsMatched"), state),
        "Complete": conditions.complete(
            nodes,
            capture.status.condition("Complete"),
            gone=gone,
            max_files=capture.spec.rotation.max_files,
        ),
        "DiskPressure": conditions.disk_pressure(nodes) if running else conditions.NOT_RUNNING,
        "Degraded": conditions.degraded(nodes) if running else conditions.NOT_RUNNING,
    }
    return PacketCaptureStatus(
        phase=state.phase,
        conditions=_conditions(capture.status, findings, generation=capture.metadata.generation, now=now),
        pods=_sum(node.pods for node in nodes),
        packets=_sum(node.packets for node in nodes),
        bytes=_sum(node.bytes for node in nodes),
        dropped=_sum(node.dropped for node in nodes),
        seen=_sum(node.seen for node in nodes),
        evicted=_sum(node.evicted for node in nodes),
        interruptions=_sum(node.interruptions for node in nodes),
        agents=agents,
        finished_time=_whole_seconds(admission.ends) if admission.ends and admission.has_ended(now) else None,
        nodes=[_summary(node) for node in nodes[:LONGEST_LIST]],
        more_nodes=max(0, len(nodes) - LONGEST_LIST),
    )


def settles_at(previous: PacketCaptureStatus, admission: Admission, *, agents: int, now: datetime) -> datetime | None:
    """When every agent has had time to report what an admission that was made lately means to it; None without one."""
    if not admission.admitted:
        return None
    admitted = previous.condition("Admitted")
    since = admitted.last_transition_time if admitted is not None and admitted.status == "True" else now
    # Not beyond what the clock says now, should it have been set back.
    return min(since, now) + SETTLING + agents * SETTLING_PER_AGENT


def unreadable(previous: PacketCaptureStatus, *, message: str, generation: int, now: datetime) -> PacketCaptureStatus:
    """The status of a capture whose spec can't be read, as can happen to one made while no webhook stood guard."""
    findings = dict.fromkeys(("Admitted", "Capturing"), Finding("False", "SpecUnreadable", message))
    told = _conditions(previous, findings, generation=generation, now=now)
    return previous.model_copy(update={"phase": "Error", "conditions": told})


def without_numbers(status: PacketCaptureStatus) -> PacketCaptureStatus:
    """What must be told also when kube-apiserver refuses what nodes have counted."""
    return PacketCaptureStatus(phase=status.phase, conditions=status.conditions, finished_time=status.finished_time)


def headline(status: PacketCaptureStatus) -> tuple[object, ...]:
    """What everyone is to know at once: phase and conditions, without their messages, which name counts."""
    told = [(one.type, one.status, one.reason, one.observed_generation) for one in status.conditions]
    return status.phase, status.finished_time, told


def outline(status: PacketCaptureStatus) -> tuple[object, ...]:
    """The status without what merely counts up, and without messages, as they do so too."""
    nodes = [(node.node, node.state, node.reason, node.pods) for node in status.nodes]
    return headline(status), status.pods, status.more_nodes, nodes


def _state(
    capture: PacketCapture,
    admission: Admission,
    nodes: Sequence[Said],
    *,
    agents: int,
    settled: bool,
    now: datetime,
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
    return _running(capture, nodes, agents=agents, settled=settled)


def _is_running(capture: PacketCapture, admission: Admission, now: datetime) -> bool:
    """Whether it is to capture now. Else what nodes can't do is no trouble of it."""
    start = capture.spec.start_time
    return admission.admitted and not admission.has_ended(now) and (start is None or start <= now)


def _frozen(previous: Condition | None, state: _State) -> Finding:
    """What was found last stays while nobody looks."""
    if previous is not None and previous.status != "Unknown":
        return Finding(previous.status, previous.reason, previous.message)
    return Finding("Unknown", state.reason, state.message)


def _running(capture: PacketCapture, nodes: Sequence[Said], *, agents: int, settled: bool) -> _State:
    """The state of a capture that should be running: what goes best decides, and trouble elsewhere is told with it."""
    troubled = [node for node in nodes if node.troubled]
    capturing = [node for node in nodes if node.state == "Capturing"]
    if capturing:
        return _State("Capturing", "Capturing", _with_trouble(_captured(capturing), troubled), runs=True)
    waiting = [node for node in nodes if node.state == "WaitingForTraffic"]
    if waiting:
        reason, message = _waiting(waiting)
        runs = any(node.pods for node in waiting)
        return _State("WaitingForTraffic", reason, _with_trouble(message, troubled), runs=runs)
    if troubled:
        return _State("Error", conditions.worst_reason(troubled), conditions.told(troubled))
    if not agents:
        return _State("Scheduled", "NoAgent", conditions.NO_AGENT)
    if not settled or any(node.state == "Scheduled" for node in nodes):
        return _State("Scheduled", "Starting", conditions.STARTING)
    return _State("WaitingForTraffic", "NoPodMatches", conditions.no_pod_matches(capture.metadata.namespace))


def _waiting(nodes: Sequence[Said]) -> tuple[str, str]:
    """Why no packet has come yet, as reason and message."""
    captured = [node for node in nodes if node.pods]
    if filtering := [node for node in captured if node.reason == "FilterMatchedNothing"]:
        pods = counted(sum(node.pods for node in filtering), "pod")
        seen = counted(sum(node.seen for node in filtering), "packet")
        return "FilterMatchedNothing", f"filter matched 0 of {seen} seen on {pods}"
    if captured:
        return "NoPacketYet", f"{_captured(captured)}, and no packet has come yet"
    said = next((node for node in nodes if node.reason), nodes[0])
    return said.reason or "NoPacketYet", said.message or "no packet has come yet"


def _captured(nodes: Sequence[Said]) -> str:
    pods = sum(node.pods for node in nodes)
    return f"{counted(pods, 'pod')} {'is' if pods == 1 else 'are'} captured on {counted(len(nodes), 'node')}"


def _with_trouble(message: str, troubled: Sequence[Said]) -> str:
    return f"{message}; {conditions.told(troubled)}" if troubled else message


def _troubled_first(node: Said) -> tuple[bool, bool, bool, str]:
    lossless = not (node.evicted or node.interruptions or node.dropped)
    return not node.failed, not node.troubled, lossless, node.node


def _summary(said: Said) -> NodeSummary:
    return NodeSummary(
        node=said.node,
        state=said.state,
        reason=said.reason,
        message=said.message,
        pods=said.pods,
        packets=said.packets,
        bytes=said.bytes,
        dropped=said.dropped,
        seen=said.seen,
        evicted=said.evicted,
        interruptions=said.interruptions,
    )


def _conditions(
    previous: PacketCaptureStatus, findings: Mapping[str, Finding], *, generation: int, now: datetime
) -> list[Condition]:
    """The findings as conditions; the time of one is that of its last change of status."""
    told = []
    for kind, finding in findings.items():
        before = previous.condition(kind)
        since = before.last_transition_time if before is not None and before.status == finding.status else now
        told.append(
            Condition(
                type=kind,
                status=finding.status,
                reason=finding.reason,
                message=finding.message,
                last_transition_time=_whole_seconds(since),
                observed_generation=generation,
            )
        )
    return told


def _sum(counts: Iterable[int]) -> int:
    return min(sum(counts), LARGEST_COUNT)


def _whole_seconds(moment: datetime) -> datetime:
    """As they are written and so read again."""
    return moment.replace(microsecond=0)
