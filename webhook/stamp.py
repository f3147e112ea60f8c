"""The mutating half of admission: what stamp a capture gets.

It denies nothing, so that what is wrong with a capture is said by the schema, or by the validating half. It takes away
whatever stamp the user sent, and gives one to what a policy allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from api import stamp, verdict
from api.capturepolicy import CapturePolicy
from api.object import ObjectMeta
from api.packetcapture import PacketCapture, PacketCaptureSpec
from api.stamp import ANNOTATION, Stamp, StampError
from api.verdict import Circumstances
from webhook.review import Answer, Request, User

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """The update needs no judgement; the capture must carry this stamp, or none. `rule` says why in a word."""

    annotation: str | None
    rule: str


def kept(request: Request) -> Kept | None:
    """What an update that is free for everyone must carry; None when the whole spec has to be judged.

    Free is what leaves the spec alone, and what only ends the capture: an earlier end, and suspending. The stamp then
    still names who was judged and by which policy.
    """
    if request.operation != "UPDATE":
        return None
    old, new = request.old_object or {}, request.object or {}
    annotation = annotation_of(old)
    if old.get("spec") == new.get("spec"):
        return Kept(annotation, "unchanged")
    try:
        before, after = PacketCapture.model_validate(old), PacketCapture.model_validate(new)
    except ValidationError:
        return None
    if stamp.spec_hash(before.spec) == stamp.spec_hash(after.spec):
        return Kept(annotation, "unchanged")
    if not only_ends(before.spec, after.spec):
        return None
    try:
        return Kept(stamp.rebound(before, after.spec), "ends")
    except StampError:
        return Kept(annotation, "ends")


def only_ends(old: PacketCaptureSpec, new: PacketCaptureSpec) -> bool:
    """Whether the change is nothing but an earlier end, or suspending, or both."""
    otherwise = new.model_copy(update={"end_time": old.end_time, "suspend": old.suspend})
    if stamp.spec_hash(otherwise) != stamp.spec_hash(old):
        return False
    if old.suspend and not new.suspend:
        return False
    if old.end_time is None:
        return True
    return new.end_time is not None and new.end_time <= old.end_time


def starts_again(request: Request, now: datetime) -> bool:
    """Whether an update moves the start of a capture that has started to a later moment: its longest duration would
    begin anew each time, and it would keep its place for ever."""
    if request.operation != "UPDATE":
        return False
    try:
        before, after = PacketCapture.model_validate(request.old_object), PacketCapture.model_validate(request.object)
    except ValidationError:
        return False
    started, starts = before.starts, after.spec.start_time or before.metadata.creation_timestamp
    return started is not None and started <= now and (starts is None or starts > started)


def issue(capture: PacketCapture, policy: CapturePolicy, *, user: User) -> Stamp:
    """The stamp of a capture that the policy allows to the user."""
    return Stamp(
        user=user.username,
        policy=policy.metadata.name,
        limits=policy.spec.limits,
        namespace=capture.metadata.namespace or "",
        spec_hash=stamp.spec_hash(capture.spec),
    )


def deserved(request: Request, usable: Sequence[CapturePolicy], circumstances: Circumstances) -> str | None:
    """The annotation for a capture that has to be judged; None when no policy allows it, or it can't be read."""
    try:
        capture = capture_of(request)
    except ValidationError:
        return None
    policy = verdict.judge(capture.spec, usable, circumstances).policy
    return None if policy is None else issue(capture, policy, user=request.user_info).to_annotation()


def put(request: Request, annotation: str | None) -> Answer:
    """Allow, and see to it that the capture carries exactly this annotation, or none."""
    if not isinstance((request.object or {}).get("metadata"), dict):
        return Answer()  # no place for it: the validating half says so
    annotations = annotations_of(request.object or {})
    path = f"/metadata/annotations/{ANNOTATION.replace('~', '~0').replace('/', '~1')}"
    if annotation == (annotations or {}).get(ANNOTATION):
        return Answer()
    if annotation is None:
        return Answer(patch=[{"op": "remove", "path": path}])
    if annotations is None:
        return Answer(patch=[{"op": "add", "path": "/metadata/annotations", "value": {ANNOTATION: annotation}}])
    return Answer(patch=[{"op": "add", "path": path, "value": annotation}])


def capture_of(request: Request) -> PacketCapture:
    """The capture that is asked for, in the namespace of the request. Raises `ValidationError`."""
    capture = PacketCapture.model_validate(request.object)
    metadata = capture.metadata.model_copy(update={"namespace": request.namespace})
    return capture.model_copy(update={"metadata": metadata})


def created_of(request: Request) -> datetime | None:
    """When the capture was created; None for one that is to be created now, whatever it says of itself."""
    if request.operation != "UPDATE":
        return None
    try:
        return ObjectMeta.model_validate((request.old_object or {}).get("metadata")).creation_timestamp
    except ValidationError:
        return None


def annotation_of(item: Json) -> str | None:
    """The stamp as it stands on an object, whatever else is wrong with the object."""
    value = (annotations_of(item) or {}).get(ANNOTATION)
    return value if isinstance(value, str) else None


def annotations_of(item: Json) -> Json | None:
    """The annotations, None where there are none, or something else in their place."""
    metadata = item.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    return annotations if isinstance(annotations, dict) else None
