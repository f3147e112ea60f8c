"""AdmissionReview (admission.k8s.io/v1): what kube-apiserver asks, and the form of an answer."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, ValidationError

from api.object import GROUP, Model, explain
from kube.status import StatusError

Json = dict[str, Any]

API_VERSION = "admission.k8s.io/v1"
RESOURCE = "packetcaptures"
LONGEST_WARNING = 119
"""Characters; kube-apiserver cuts warnings when all of them together are too long."""


class ReviewError(ValueError):
    """The body is no review of ours; the message says what is wrong with it."""


class User(Model):
    """`authentication.k8s.io/v1 UserInfo`: the user after impersonation."""

    username: str = ""
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class Resource(Model):
    group: str = ""
    version: str
    resource: str


class Request(Model):
    """`AdmissionRequest`, those fields of it that decisions need."""

    uid: str
    resource: Resource
    sub_resource: str = ""
    name: str = ""
    """Empty for a creation by generateName."""
    namespace: str = ""
    operation: Literal["CREATE", "UPDATE", "DELETE", "CONNECT"]
    user_info: User
    object: Json | None = None
    old_object: Json | None = None

    @property
    def is_ours(self) -> bool:
        """Whether there is something to decide: status, finalization and deletion are never in our hands."""
        return self.operation in ("CREATE", "UPDATE") and not self.sub_resource


class _Review(Model):
    api_version: Literal["admission.k8s.io/v1"]
    kind: Literal["AdmissionReview"]
    request: Request


@dataclass(frozen=True, slots=True)
class Answer:
    """Allowed unless there is a refusal; `audit` goes into kube-apiserver's audit log."""

    refusal: StatusError | None = None
    patch: Sequence[Json] = ()
    warnings: Sequence[str] = ()
    audit: Mapping[str, str] = field(default_factory=dict)

    def to_json(self, uid: str) -> Json:
        response: Json = {"uid": uid, "allowed": self.refusal is None}
        if self.refusal is not None:
            response["status"] = self.refusal.to_json()
        if self.patch:
            response["patchType"] = "JSONPatch"
            response["patch"] = base64.b64encode(json.dumps(list(self.patch)).encode()).decode()
        if self.warnings:
            response["warnings"] = [_cut(warning) for warning in self.warnings]
        if self.audit:
            response["auditAnnotations"] = dict(self.audit)
        return {"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response}


def _cut(warning: str) -> str:
    return warning if len(warning) <= LONGEST_WARNING else f"{warning[: LONGEST_WARNING - 1]}…"


def parse(body: bytes) -> Request:
    """Read a review of a PacketCapture. Raises `ReviewError`."""
    try:
        request = _Review.model_validate_json(body).request
    except ValidationError as error:
        raise ReviewError(f"this is no AdmissionReview: {explain(error)}") from error
    if (request.resource.group, request.resource.resource) != (GROUP, RESOURCE):
        raise ReviewError(f"{request.resource.resource}.{request.resource.group} are not judged here: {RESOURCE} are")
    if request.is_ours and request.object is None:
        raise ReviewError("request.object is missing")
    if request.is_ours and request.operation == "UPDATE" and request.old_object is None:
        raise ReviewError("request.oldObject is missing")
    return request
