"""Whether a user may do what a request asks: kube-apiserver's answer to a SubjectAccessReview.

kube-apiserver has authorized a request before it forwards it, but a request may also reach us past it. So every one is
reviewed again, with everything that is known of the user; what can't be reviewed is refused.
"""

import asyncio
import hashlib
import json
import logging
from dataclasses import dataclass

from apiserver.aggregation.authentication import ANONYMOUS, User
from apiserver.aggregation.requestinfo import RequestInfo
from kube.answers import Answers
from kube.client import SUBJECTACCESSREVIEWS, Client, Json
from kube.status import StatusError, internal_error

_log = logging.getLogger(__name__)

_LIFETIME = 10.0
_PATIENCE = 10.0
_DECISIONS = 4096
_PROBE_INTERVAL = 5.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What a SubjectAccessReview says; without permission, `reason` may say why."""

    allowed: bool
    reason: str = ""


class Authorizer:
    """Asks kube-apiserver, and keeps each answer for ten seconds."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._decisions: Answers[bytes, Decision] = Answers(lifetime=lambda _: _LIFETIME, size=_DECISIONS)
        self._trouble: str | None = "no SubjectAccessReview was answered yet"

    async def run(self) -> None:
        """While reviews fail, try one now and then, so that readiness returns without a user's request."""
        probe = RequestInfo(path="/healthz", verb="get")
        while True:
            if self._trouble is not None:
                try:
                    await self._review(review(ANONYMOUS, probe))
                except StatusError as error:
                    _log.warning("authorization does not work: %s", error.message)
            await asyncio.sleep(_PROBE_INTERVAL)

    def check(self) -> str | None:
        """Why requests can't be authorized at the moment."""
        return self._trouble

    async def authorize(self, user: User, info: RequestInfo) -> None:
        """Return when the request is allowed. Raises `StatusError`: 403 when not, 500 when that can't be told."""
        spec = review(user, info)
        key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).digest()
        decision = await self._decisions.get(key, lambda: self._review(spec))
        if not decision.allowed:
            raise forbidden(user, info, decision.reason)

    async def _review(self, spec: Json) -> Decision:
        body = {"apiVersion": SUBJECTACCESSREVIEWS.api_version, "kind": SUBJECTACCESSREVIEWS.kind, "spec": spec}
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await self._client.create(SUBJECTACCESSREVIEWS, body)
            decision = decide(answer.get("status"))
        except (StatusError, TimeoutError, ValueError) as error:
            failure = f"a SubjectAccessReview failed: {str(error) or type(error).__name__}"
            # A review that is itself malformed (400, 422) is one user's trouble, and must not end the readiness of all.
            if not isinstance(error, StatusError) or error.code not in (400, 422):
                self._trouble = failure
            raise internal_error(f"Internal error occurred: {failure}") from error
        self._trouble = None
        return decision


def review(user: User, info: RequestInfo) -> Json:
    """The `spec` of the SubjectAccessReview for a request."""
    spec: Json = {"user": user.name}
    if user.uid:
        spec["uid"] = user.uid
    if user.groups:
        spec["groups"] = list(user.groups)
    if user.extra:
        spec["extra"] = {key: list(values) for key, values in user.extra.items()}
    if info.is_resource_request:
        attributes = {
            "namespace": info.namespace,
            "verb": info.verb,
            "group": info.api_group,
            "version": info.api_version,
            "resource": info.resource,
            "subresource": info.subresource,
            "name": info.name,
        }
        spec["resourceAttributes"] = {key: value for key, value in attributes.items() if value}
        for kind in ("field", "label"):
            if selector := getattr(info, f"{kind}_selector"):
                spec["resourceAttributes"][f"{kind}Selector"] = {"rawSelector": selector}
    else:
        spec["nonResourceAttributes"] = {"path": info.path, "verb": info.verb}
    return spec


def decide(status: object) -> Decision:
    """Read a review's `status`: both allowed and denied is a denial. Raises `ValueError` when it holds no answer."""
    if not isinstance(status, dict) or not isinstance(status.get("allowed"), bool):
        raise ValueError("the review has no status")  # noqa: TRY004 - what was read is wrong, not our call
    allowed = status["allowed"] and status.get("denied") is not True
    return Decision(allowed, str(status.get("reason") or ""))


def forbidden(user: User, info: RequestInfo, reason: str = "") -> StatusError:
    """The refusal, in the words of `k8s.io/apiserver` (`ForbiddenStatusError`)."""
    if info.is_resource_request:
        resource = f"{info.resource}/{info.subresource}" if info.subresource else info.resource
        scope = f"in the namespace {_quoted(info.namespace)}" if info.namespace else "at the cluster scope"
        action = f"{info.verb} resource {_quoted(resource)} in API group {_quoted(info.api_group)} {scope}"
    else:
        action = f"{info.verb} path {_quoted(info.path)}"
    message = f"User {_quoted(user.name)} cannot {action}"
    message = message.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if reason:
        message = f"{message}: {reason}"
    if not info.is_resource_request:
        return StatusError(403, f"forbidden: {message}", details={})
    qualified = f"{info.resource}.{info.api_group}" if info.api_group else info.resource
    subject = f"{qualified} {_quoted(info.name)}" if info.name else qualified
    details = {"name": info.name, "group": info.api_group, "kind": info.resource}
    return StatusError(
        403, f"{subject} is forbidden: {message}", details={key: value for key, value in details.items() if value}
    )


def _quoted(text: str) -> str:
    """As Go's `%q` does it for what can stand in a name."""
    return json.dumps(text, ensure_ascii=False)
