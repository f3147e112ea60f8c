"""The admission stamp: who asked for a capture and by which policy, bound to the spec that was judged.

The webhook writes it; agents and the controller obey only a spec that it fits. So a capture that was made or changed
while no webhook stood guard does nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, ValidationError

from api.capturepolicy import Limits
from api.object import Model
from api.packetcapture import PacketCapture, PacketCaptureSpec

ANNOTATION = "kubepcap.io/admission"

_FIRST_LIMITS = {
    *("maxBytesPerNode", "maxCapturesPerNamespace", "maxDuration", "maxFileSize", "maxFiles", "maxSnapLength"),
    "ringSize",
}
_LATER_LIMITS = {name: value for name, value in Limits().to_json().items() if name not in _FIRST_LIMITS}


class StampError(ValueError):
    """The capture carries no stamp that fits; `reason` is one word for conditions, the message says what to do."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Stamp(Model):
    """What admission decided."""

    user: str
    """Who created the capture, or last changed its spec."""
    policy: str
    """The policy that allowed it."""
    limits: Limits
    """That policy's limits when it was allowed."""
    namespace: str
    """The namespace for which it was allowed."""
    spec_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the spec that was allowed."""

    def to_annotation(self) -> str:
        """As JSON, without the limits that came later and have their defaults.

        So it is the same for releases that do not know of them, of which the first compare stamps as text.
        """
        written = self.to_json()
        written["limits"] = dict(written["limits"].items() - _LATER_LIMITS.items())
        return _canonical(written)

    def ends(self, capture: PacketCapture) -> datetime | None:
        """When capturing must end: the end time, and at the latest the policy's longest duration after the start."""
        starts = capture.starts
        latest = starts + self.limits.max_duration if starts is not None else None
        given = capture.spec.end_time
        return min((moment for moment in (latest, given) if moment is not None), default=None)


def spec_hash(spec: PacketCaptureSpec) -> str:
    """SHA-256 of the spec in a canonical form: defaults left out, so that a later default changes no hash."""
    return hashlib.sha256(_canonical(spec.model_dump(mode="json", exclude_defaults=True)).encode()).hexdigest()


def same(one: str | None, other: str | None) -> bool:
    """Whether two annotations say the same, as those of two releases do in different words.

    One with something that this release does not know is the same as nothing but its own text: a newer release may
    obey what is written there.
    """
    if one is None or other is None or one == other:
        return one == other
    try:
        return _known(one) == _known(other)
    except ValidationError:
        return False


def rebound(capture: PacketCapture, spec: PacketCaptureSpec) -> str:
    """The annotation of the capture, bound to another spec. Raises `StampError` when it does not fit the present one.

    The rest stays as it is written, with the limits that only a newer release knows.
    """
    check(capture)
    written = json.loads(capture.metadata.annotations[ANNOTATION])
    return _canonical(written | {"specHash": spec_hash(spec)})


def read(annotations: Mapping[str, str]) -> Stamp | None:
    """The stamp as it stands, or None. Raises `StampError` when it can't be read."""
    text = annotations.get(ANNOTATION)
    if text is None:
        return None
    try:
        return Stamp.model_validate_json(text)
    except ValidationError as error:
        raise StampError("StampUnreadable", f"the annotation {ANNOTATION} can't be read: {_AGAIN}") from error


def check(capture: PacketCapture) -> Stamp:
    """The stamp that fits this capture. Raises `StampError`."""
    stamp = read(capture.metadata.annotations)
    if stamp is None:
        raise StampError("NotStamped", f"it was created while the admission webhook was not in place: {_AGAIN}")
    if stamp.namespace != capture.metadata.namespace:
        raise StampError("StampForeign", f"its stamp is that of a capture in another namespace: {_AGAIN}")
    if stamp.spec_hash != spec_hash(capture.spec):
        raise StampError("StampOutdated", f"its spec was changed while the webhook was not in place: {_AGAIN}")
    return stamp


def _known(annotation: str) -> Stamp:
    return Stamp.model_validate_json(annotation, extra="forbid")


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


_AGAIN = "delete it and create it again while the webhook is up"
