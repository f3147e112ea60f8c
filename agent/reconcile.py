"""What this node shall capture now, and why not the rest: a pure function of what Kubernetes says and the time.

It is asked again after every change and at the time that it names itself, and answers from the whole state each time.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from pydantic import ValidationError

from agent.capturer.protocol import ProtocolError, Target
from agent.pods import OPT_OUT_LABEL, OPT_OUT_VALUE, Pod
from api import stamp
from api.capturepolicy import Limits
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
class Pauses:
    """What is not captured for the time being, for want of room: nothing on the node, of a namespace, of a capture."""

    node: Verdict | None = None
    namespaces: Mapping[str, Verdict] = field(default_factory=dict)
    captures: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def verdicts(self) -> set[Verdict]:
        return {*filter(None, [self.node]), *self.namespaces.values(), *self.captures.values()}

    def of(self, metadata: ObjectMeta) -> Verdict | None:
        return self.node or self.namespaces.get(metadata.namespace or "") or self.captures.get(metadata.uid)


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """How much may be captured on the node at once: pods times captures, and bytes of memory for their rings."""

    targets: int = 256
    ring_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Order:
    """A PacketCapture that may be obeyed: read, its stamp fitting. `end` is when it ends at the latest.

    What it makes of each pod is remembered: there are many pods and captures, and only few of them change at a time.
    """

    capture: PacketCapture
    selector: PodSelector = field(compare=False)
    filter: str
    limits: Limits
    end: datetime | None
    direct: bool = False
    known: dict[str, tuple[Pod, "Target | Verdict | None"]] = field(default_factory=dict, compare=False, repr=False)

    def of(self, pod: Pod) -> "Target | Verdict | None":
        """How to capture the pod, or why that can't be done; None when the capture does not concern it."""
        known = self.known.get(pod.name)
        if known is not None and known[0] is pod:
            return known[1]
        made = self._target_of(pod) if self._matches(pod) else None
        self.known[pod.name] = pod, made
        return made

    def forget_others(self, names: Collection[str]) -> None:
        """Remember only pods of these names."""
        if len(self.known) > len(names):
            for name in self.known.keys() - names:
                del self.known[name]

    def _matches(self, pod: Pod) -> bool:
        same = pod.namespace == self.capture.metadata.namespace
        return same and not pod.finished and self.selector.matches(pod.labels)

    def _target_of(self, pod: Pod) -> "Target | Verdict":
        obstacle = _obstacle(pod)
        if obstacle is not None:
            return obstacle
        spec = self.capture.spec
        age = spec.rotation.max_file_age
        try:
            return Target(
                capture_uid=self.capture.metadata.uid,
                pod_uid=pod.cgroup_uid,
                pod_name=pod.name,
                pod_addresses=pod.addresses,
                interfaces=tuple(dict.fromkeys(spec.interfaces)),
                filter=self.filter,
                snap_length=spec.snap_length,
                ring_bytes=self.limits.ring_size,
                max_file_bytes=spec.rotation.max_file_size,
                max_file_age_seconds=max(1, round(age / timedelta(seconds=1))) if age else 0,
                max_files=spec.rotation.max_files,
                until=self.end.timestamp() if self.end is not None else None,
                direct=self.direct,
            )
        except ProtocolError as error:
            return Verdict("Error", "NotSupported", f"pod {pod.name} can't be captured: {error}")


@dataclass(frozen=True, slots=True)
class Capture:
    """A PacketCapture, or why it can't be obeyed. One that can't even be read keeps its UID, so its files stay."""

    metadata: ObjectMeta
    order: Order | Verdict

    @property
    def uid(self) -> str:
        return self.metadata.uid

    @property
    def agents(self) -> int:
        """How many agents there are in the cluster, as the controller wrote it to this capture."""
        return self.order.capture.status.agents if isinstance(self.order, Order) else 0


def parse_capture(document: Json, *, direct: bool = False) -> Capture:
    """Read a PacketCapture and check its stamp. Raises ValueError when it has no proper metadata.

    Two versions between which nothing changed that an agent goes by are equal: a status is written often.
    `direct` asks for writes past the page cache.
    """
    metadata = ObjectMeta.model_validate(_only(_METADATA, document["metadata"]))
    try:
        capture = PacketCapture.model_validate(
            document | {"metadata": metadata, "status": _obeyed(document.get("status") or {})}
        )
        stamped = stamp.check(capture)
    except ValidationError as error:
        message = f"this release of the agent can't read it: {explain(error)}"
        return Capture(metadata, Verdict("Error", "Unreadable", message))
    except stamp.StampError as error:
        return Capture(metadata, Verdict("Error", error.reason, str(error)))
    spec = capture.spec
    order = Order(capture, spec.pods(), spec.filter_expression(), stamped.limits, stamped.ends(capture), direct)
    return Capture(metadata, order)


_METADATA: Final = frozenset({"name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "annotations"})


def _obeyed(status: Json) -> Json:
    """What of the status an agent goes by: whether the capture is admitted, and how many agents there are."""
    admitted = [one for one in status.get("conditions") or [] if one.get("type") == "Admitted"]
    return _only({"agents"}, status) | {"conditions": admitted}


def _only(names: Collection[str], document: Json) -> Json:
    return {name: value for name, value in document.items() if name in names}


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What becomes of one capture on this node: its targets, or a verdict that says why there are none.

    Both are there when some of the `matched` pods can be captured and others can't. Neither is when no pod matches.
    What is held back as a whole matches no pod: nobody waits for one.
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
    agents: int = 0
    """How many agents there are in the cluster, as far as the controller has said."""


def plan(
    captures: Iterable[Capture],
    pods: Collection[Pod],
    *,
    namespaces_opted_out: Collection[str],
    now: datetime,
    limits: NodeLimits,
    running: Mapping[str, int] | None = None,
    paused: Pauses | None = None,
) -> Plan:
    """Decide for all captures.

    `running` are the targets that have a place already, with the number of interfaces of each: `limits` never take it
    from them. Of the others the older capture goes first. `paused` stops captures with its verdicts (a full disk).
    """
    paused = paused or Pauses()
    by_namespace: defaultdict[str, dict[str, Pod]] = defaultdict(dict)
    for pod in pods:
        by_namespace[pod.namespace][pod.name] = pod
    plans: dict[str, CapturePlan] = {}
    moments: list[datetime] = []
    room = _Room(limits, running or {})
    for capture in sorted(captures, key=_age):
        if isinstance(capture.order, Verdict):
            plans[capture.uid] = CapturePlan(capture, verdict=capture.order)
            continue
        order, own = capture.order, by_namespace[capture.metadata.namespace or ""]
        moments += _moments(order, now)
        if (held_back := _held_back(order, now)) is not None:
            order.forget_others(())
            plans[capture.uid] = CapturePlan(capture, verdict=held_back)
            continue
        order.forget_others(own.keys())
        matched = [(pod, found) for pod in own.values() if (found := order.of(pod)) is not None]
        if (pause := paused.of(capture.metadata)) is not None:
            plans[capture.uid] = CapturePlan(capture, len(matched), verdict=pause)
        else:
            opted_out = capture.metadata.namespace in namespaces_opted_out
            made = _plan_pods(capture, matched, opted_out=opted_out)
            plans[capture.uid] = _within_policy(made, order.limits.max_pods_per_node, running or {})
    room.reserve(target for each in plans.values() for target in each.targets)
    plans = {uid: room.admit(each) for uid, each in plans.items()}
    targets = {target.id: target for each in plans.values() for target in each.targets}
    agents = max((each.capture.agents for each in plans.values()), default=0)
    return Plan(tuple(plans.values()), targets, min(moments, default=None), agents)


def _age(capture: Capture) -> tuple[datetime, str]:
    return capture.metadata.creation_timestamp or _NEVER, capture.uid


_NEVER = datetime.max.replace(tzinfo=UTC)


class _Room:
    """What the node's limits leave."""

    def __init__(self, limits: NodeLimits, running: Mapping[str, int]) -> None:
        self._limits = limits
        self._running = running
        self._targets = limits.targets
        self._ring_bytes = limits.ring_bytes

    def reserve(self, targets: Iterable[Target]) -> None:
        """Those that run keep their place."""
        for target in targets:
            if target.id in self._running:
                self._take(target)

    def admit(self, plan: CapturePlan) -> CapturePlan:
        """The plan without the targets for which there is no room."""
        refused: dict[str, str] = {}
        for target in plan.targets:
            if target.id not in self._running:
                limit = self._limit_reached(target)
                if limit is None:
                    self._take(target)
                else:
                    refused[target.id] = limit
        if not refused:
            return plan
        limit = next(iter(refused.values()))
        message = f"{len(refused)} of its pods are not captured, since {limit} on this node at once"
        verdict = _most_telling([each for each in (plan.verdict, Verdict("Error", "NodeLimit", message)) if each])
        return replace(
            plan, targets=tuple(target for target in plan.targets if target.id not in refused), verdict=verdict
        )

    def _limit_reached(self, target: Target) -> str | None:
        if self._targets < 1:
            return f"at most {self._limits.targets} pods times captures (MAX_TARGETS) are"
        if self._ring_bytes < self._size(target):
            return f"at most {self._limits.ring_bytes >> 20} MiB of rings (MAX_RING_BYTES) are allowed"
        return None

    def _take(self, target: Target) -> None:
        self._targets -= 1
        self._ring_bytes -= self._size(target)

    def _size(self, target: Target) -> int:
        """How many interfaces a pod has is known once it is captured."""
        return target.ring_bytes * max(1, len(target.interfaces), self._running.get(target.id, 1))


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


def _plan_pods(capture: Capture, matched: list[tuple[Pod, Target | Verdict]], *, opted_out: bool) -> CapturePlan:
    if opted_out and matched:
        return CapturePlan(capture, len(matched), verdict=_opted_out(f"namespace {capture.metadata.namespace}"))
    targets = [made for _, made in matched if isinstance(made, Target)]
    verdicts = [made for _, made in matched if isinstance(made, Verdict)]
    ending = frozenset(made.id for pod, made in matched if pod.terminating and isinstance(made, Target))
    return CapturePlan(capture, len(matched), tuple(targets), _most_telling(verdicts), ending)


def _within_policy(plan: CapturePlan, most: int | None, running: Collection[str]) -> CapturePlan:
    """The plan without the pods that are more than the policy allows on a node; those that run keep their place."""
    if most is None or len(plan.targets) <= most:
        return plan
    kept = sorted(plan.targets, key=lambda target: target.id not in running)[:most]
    message = (
        f"{len(plan.targets) - most} of its pods are not captured, since its policy allows {most} on a node at once "
        "(limits.maxPodsPerNode)"
    )
    verdict = _most_telling([each for each in (plan.verdict, Verdict("Error", "PolicyLimit", message)) if each])
    return replace(plan, targets=tuple(kept), verdict=verdict)


def _most_telling(verdicts: list[Verdict]) -> Verdict | None:
    return min(verdicts, key=lambda verdict: verdict.state != "Error", default=None)


def _obstacle(pod: Pod) -> Verdict | None:
    """Why a matching pod can't be captured; None when it can.

    A pod that is terminating is captured to its end: how it closes its connections is part of its traffic.
    """
    if pod.opted_out:
        return _opted_out(f"pod {pod.name}")
    if pod.host_network:
        message = f"pod {pod.name} uses the node's network, which holds everyone's traffic: such pods are not captured"
        return Verdict("Error", "HostNetwork", message)
    if not pod.addresses:
        return Verdict("WaitingForTraffic", "PodHasNoAddress", f"pod {pod.name} has no address yet")
    return None


def _opted_out(what: str) -> Verdict:
    return Verdict("Error", "OptedOut", f"{what} has the label {OPT_OUT_LABEL}={OPT_OUT_VALUE}")


def _moments(order: Order, now: datetime) -> list[datetime]:
    """When time alone will change what becomes of the capture."""
    return [moment for moment in (order.capture.spec.start_time, order.end) if moment is not None and moment > now]
