"""The validating half of admission: whether a capture may be, and whether the stamp on it is ours.

It trusts nothing of the mutating half, which an object can have passed long before, or not at all: it judges again, and
wants to find the stamp that it would have given itself, though perhaps in the words of another release.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from api import stamp, verdict
from api.capturepolicy import CapturePolicy
from api.object import explain, format_timestamp
from api.packetcapture import PacketCapture
from api.quantity import format_duration
from api.stamp import ANNOTATION, Stamp
from api.verdict import Circumstances
from kube.status import StatusError, forbidden, internal_error
from webhook.review import Answer, Request
from webhook.stamp import Kept, annotation_of, capture_of, issue


@dataclass(frozen=True, slots=True)
class Policies:
    """All there are: those that the user may use, the names of those that exist, and of those that can't be read."""

    usable: Sequence[CapturePolicy]
    existing: Sequence[str]
    unreadable: Sequence[str] = ()


def judge_kept(request: Request, expected: Kept) -> Answer:
    """An update that is free for everyone may not touch the stamp."""
    if stamp.same(annotation_of(request.object or {}), expected.annotation):
        return Answer(audit={"rule": expected.rule})
    return Answer(
        refusal=forbidden(f"the annotation {ANNOTATION} is written by admission alone: leave it as it was"),
        audit={"rule": "foreign-stamp"},
    )


def judge(request: Request, policies: Policies, circumstances: Circumstances) -> Answer:
    """A creation, or an update whose whole spec has to be judged."""
    try:
        capture = capture_of(request)
    except ValidationError as error:
        return Answer(refusal=StatusError(422, explain(error)), audit={"rule": "unreadable"})
    found = verdict.judge(capture.spec, policies.usable, circumstances)
    if found.policy is None:
        words = verdict.denial(
            found, user=request.user_info.username, namespace=request.namespace, existing=policies.existing
        )
        if policies.unreadable:
            words += f"; not considered, since they can't be read: {', '.join(sorted(policies.unreadable))}"
        return Answer(refusal=forbidden(words), audit={"rule": "denied"})
    annotation = annotation_of(request.object or {})
    if annotation is None:
        return Answer(refusal=internal_error(_UNSTAMPED), audit={"rule": "unstamped"})
    policy = _stamped_by(capture, annotation, request, policies.usable, circumstances)
    if policy is None:
        return Answer(refusal=forbidden(_FOREIGN), audit={"rule": "foreign-stamp"})
    warnings = _warnings(capture, policy, circumstances) if request.operation == "CREATE" else []
    return Answer(warnings=warnings, audit={"policy": policy.metadata.name, "rule": "allowed"})


def _stamped_by(
    capture: PacketCapture,
    annotation: str,
    request: Request,
    usable: Sequence[CapturePolicy],
    circumstances: Circumstances,
) -> CapturePolicy | None:
    """The policy that the stamp names, if it allows the capture and the stamp says exactly what it would give.

    Any usable one will do, not only the first: the replica that stamped may know of a policy a moment earlier or later.
    """
    try:
        name = Stamp.model_validate_json(annotation).policy
    except ValidationError:
        return None
    policy = next((policy for policy in usable if policy.metadata.name == name), None)
    if policy is None or verdict.refused(capture.spec, policy, circumstances) is not None:
        return None
    given = issue(capture, policy, user=request.user_info).to_annotation()
    return policy if stamp.same(annotation, given) else None


def _warnings(capture: PacketCapture, policy: CapturePolicy, circumstances: Circumstances) -> list[str]:
    if capture.spec.end_time is not None:
        return []
    longest = policy.spec.limits.max_duration
    ends = format_timestamp((capture.spec.start_time or circumstances.now) + longest)
    return [f"no endTime: capturing ends at {ends}, after {format_duration(longest)} (policy {policy.metadata.name})"]


_UNSTAMPED = (
    "it would be allowed, but the mutating webhook stamp.kubepcap.io did not stamp it: "
    "try again, and if that does not help see whether that webhook is configured"
)
_FOREIGN = (
    f"the annotation {ANNOTATION} is not the one that admission gives: "
    "a policy was changed at this moment, or another webhook changed the capture; try again"
)
