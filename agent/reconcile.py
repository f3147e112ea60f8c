"""What this node shall capture now, and why not the rest: a pure function of what Kubernetes says and the time.

It is asked again after every change and at the time that it names itself, and answers from the whole state each time.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import ValidationError

from agent.capturer.protocol import ProtocolError, Target
from agent.pods import OPT_OUT_LABEL, OPT_OUT_VALUE, Pod
from api import stamp
from api.object import ObjectMeta, explain
from api.packetcapture import PacketCapture, Phase
from api.selector import PodSelector
from kube.client import Json


@dataclass(frozen=True, slots=True)
class Verdict:
    """A state with its reason: one CamelCase word, and a sentence a person can act on."""

    state: Phase
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """A PacketCapture that may be obeyed: read, its stamp fitting. `end` is when it ends at the latest."""

    capture: PacketCapture
    selector: PodSelector
    end: datetime | None


@dataclass(frozen=True, slots=True)
class Capture:
    """A PacketCapture, or why it can't be obeyed. One that can't even be read keeps its UID, so its files stay."""

    metadata: ObjectMeta
    order: Order | Verdict

    @property
    def uid(self) -> str:
        return self.metadata.uid


def parse_capture(document: Json) -> Capture:
    """Read a PacketCapture and check its stamp. Raises ValueError when it has no proper metadata."""
    metadata = ObjectMeta.model_validate(document["metadata"])
    try:
        capture = PacketCapture.model_validate(document)
        end = stamp.check(capture).ends(capture)
    except ValidationError as error:
        message = f"this release of the agent can't read it: {explain(error)}"
        return Capture(metadata, Verdict("Error", "Unreadable", message))
    except stamp.StampError as error:
        return Capture(metadata, Verdict("Error", error.reason, str(error)))
    return Capture(metadata, Order(capture, capture.spec.pods(), end))


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What becomes of one capture on this node: its targets, or a verdict that says why there are none.

    Both are there when some of the `matched` pods can be captured and others can't. Neither is when no pod matches.
    `ending` are the targets whose pods are terminating: that their interface goes is no trouble.
    """

    capture: Capture
    matched: int = 0
    targets: tuple[Target, ...] = ()
    verdict: Verdict | None = None
    ending: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything to capture, a plan for each capture, and when to ask again at the latest."""

    captures: tuple[CapturePlan, ...] = ()
    targets: dict[str, Target] = field(default_factory=dict)
    wake_at: datetime | None = None


def plan(
    captures: Iterable[Capture],
    pods: Collection[Pod],
    *,
    namespaces_opted_out: Collection[str],
    now: datetime,
    ring_bytes: int,
    paused: Verdict | None = None,
) -> Plan:
    """Decide for all captures. `paused` stops every one of them, with that verdict (a full disk)."""
    plans = []
    moments: list[datetime] = []
    for capture in captures:
        if isinstance(capture.order, Verdict):
            plans.append(CapturePlan(capture, verdict=capture.order))
            continue
        matched = [pod for pod in pods if _matches(pod, capture.order)]
        verdict = _held_back(capture.order, now) or paused
        if verdict is None:
            plans.append(_plan_pods(capture, capture.order, matched, namespaces_opted_out, ring_bytes))
        else:
            plans.append(CapturePlan(capture, len(matched), verdict=verdict))
        moments += _moments(capture.order, now)
    targets = {target.id: target for capture_plan in plans for target in capture_plan.targets}
    return Plan(tuple(plans), targets, min(moments, default=None))


def _matches(pod: Pod, order: Order) -> bool:
    return pod.namespace == order.capture.metadata.namespace and not pod.finished and order.selector.matches(pod.labels)


def _held_back(order: Order, now: datetime) -> Verdict | None:
    """Why the capture as a whole takes nothing now, whatever its pods; None when it may."""
    capture = order.capture
    if capture.metadata.deletion_timestamp is not None:
        return Verdict("Finished", "Deleted", "the capture is being deleted")
    if order.end is not None and order.end <= now:
        if order.end == capture.spec.end_time:
            return Verdict("Finished", "EndTimeReached", "its end time has passed")
        return Verdict("Finished", "LongestDurationReached", "the longest duration that its policy allows has passed")
    admitted = capture.status.condition("Admitted")
    if admitted is None:
        return Verdict("Scheduled", "NotAdmittedYet", "the controller has not admitted it yet")
    if admitted.status != "True":
        return Verdict("Scheduled", admitted.reason or "NotAdmitted", admitted.message or "it is not admitted")
    if capture.spec.suspend:
        return Verdict("Scheduled", "Suspended", "spec.suspend is true; its files are kept")
    if capture.spec.start_time is not None and capture.spec.start_time > now:
        return Verdict("Scheduled", "BeforeStartTime", "its start time has not come yet")
    return None


def _plan_pods(
    capture: Capture, order: Order, matched: list[Pod], namespaces_opted_out: Collection[str], ring_bytes: int
) -> CapturePlan:
    targets = []
    verdicts = []
    for pod in matched:
        obstacle = _obstacle(pod, namespaces_opted_out)
        if obstacle is None:
            try:
                targets.append(_target(order, pod, ring_bytes=ring_bytes))
            except ProtocolError as error:
                obstacle = Verdict("Error", "NotSupported", f"pod {pod.name} can't be captured: {error}")
        if obstacle is not None:
            verdicts.append(obstacle)
    terminating = {pod.uid for pod in matched if pod.terminating}
    ending = frozenset(target.id for target in targets if target.pod_uid in terminating)
    return CapturePlan(capture, len(matched), tuple(targets), _most_telling(verdicts), ending)


def _most_telling(verdicts: list[Verdict]) -> Verdict | None:
    return min(verdicts, key=lambda verdict: verdict.state != "Error", default=None)


def _obstacle(pod: Pod, namespaces_opted_out: Collection[str]) -> Verdict | None:
    """Why a matching pod can't be captured; None when it can.

    A pod that is terminating is captured to its end: how it closes its connections is part of its traffic.
    """
    if pod.opted_out or pod.namespace in namespaces_opted_out:
        where = f"pod {pod.name}" if pod.opted_out else f"namespace {pod.namespace}"
        return Verdict("Error", "OptedOut", f"{where} has the label {OPT_OUT_LABEL}={OPT_OUT_VALUE}")
    if pod.host_network:
        message = f"pod {pod.name} uses the node's network, which holds everyone's traffic: such pods are not captured"
        return Verdict("Error", "HostNetwork", message)
    if not pod.addresses:
        return Verdict("WaitingForTraffic", "PodHasNoAddress", f"pod {pod.name} has no address yet")
    return None


def _target(order: Order, pod: Pod, *, ring_bytes: int) -> Target:
    """Raises ProtocolError when the capturer could not take it."""
    spec = order.capture.spec
    age = spec.rotation.max_file_age
    return Target(
        capture_uid=order.capture.metadata.uid,
        pod_uid=pod.uid,
        pod_name=pod.name,
        pod_addresses=pod.addresses,
        filter=spec.filter_expression(),
        snap_length=spec.snap_length,
        ring_bytes=ring_bytes,
        max_file_bytes=spec.rotation.max_file_size,
        max_file_age_seconds=max(1, round(age / timedelta(seconds=1))) if age else 0,
        max_files=spec.rotation.max_files,
        until=order.end.timestamp() if order.end is not None else None,
    )


def _moments(order: Order, now: datetime) -> list[datetime]:
    """When time alone will change what becomes of the capture."""
    return [moment for moment in (order.capture.spec.start_time, order.end) if moment is not None and moment > now]
