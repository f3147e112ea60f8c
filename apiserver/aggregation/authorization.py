"""Whether a user may do what a request asks: kube-apiserver's answer to a SubjectAccessReview.

kube-apiserver has authorized a request before it forwards it, but a request may also reach us past it. So every one is
reviewed again, with everything that is known of the user; what can't be reviewed is refused.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from apiserver.aggregation.authentication import ANONYMOUS, User
from apiserver.aggregation.requestinfo import RequestInfo
from apiserver.aggregation.review import Observe, Reviewer, ReviewError, unobserved
from kube.answers import Answers, fingerprint
from kube.client import SUBJECTACCESSREVIEWS, Client, Json
from kube.status import StatusError

_log = logging.getLogger(__name__)

LIFETIME = 10.0
"""Seconds for which an answer, yes or no, is kept."""

_DECISIONS = 8192
_DECISIONS_WEIGHT = 16 << 20
_LARGEST_KEPT = 10_000
_PROBE_INTERVAL = 5.0
_PROBE = RequestInfo(path="/healthz", verb="get")
_SHORT_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a SubjectAccessReview says; without permission, `reason` may say why."""

    allowed: bool
    reason: str = ""


class Authorizer:
    """Asks kube-apiserver, and keeps each answer for ten seconds."""

    def __init__(
        self, client: Client, *, clock: Callable[[], float] = time.monotonic, on_review: Observe = unobserved
    ) -> None:
        self._reviewer = Reviewer(client, SUBJECTACCESSREVIEWS, observe=on_review)
        self._clock = clock
        self._decisions: Answers[bytes, Decision] = Answers(
            lifetime=lambda _: LIFETIME,
            size=_DECISIONS,
            weigh=lambda decision: len(decision.reason),
            capacity=_DECISIONS_WEIGHT,
            clock=clock,
        )
        self._trouble: str | None = "no SubjectAccessReview was answered yet"
        self._answered = 0.0

    async def run(self) -> NoReturn:
        """While no request has a review answered, try one now and then, so that readiness tells how it is."""
        while True:
            if self._trouble is not None or self._clock() - self._answered >= LIFETIME:
                try:
                    await self._review(review(ANONYMOUS, _PROBE))
                except ReviewError as error:
                    _log.warning("authorization does not work: %s", error)
            await asyncio.sleep(_PROBE_INTERVAL)

    def check(self) -> str | None:
        """Why requests can't be authorized at the moment."""
        return self._trouble

    async def authorize(self, user: User, info: RequestInfo) -> None:
        """Return when the request is allowed. Raises `StatusError`: 403 when not, 500 when that can't be told."""
        spec = review(user, info)
        try:
            if is_keepable(info):
                decision = await self._decisions.get(fingerprint(spec), lambda: self._review(spec))
            else:
                decision = await self._review(spec)
        except ReviewError as error:
            raise _undecided(error) from error
        if not decision.allowed:
            raise forbidden(user, info, decision.reason)

    async def _review(self, spec: Json) -> Decision:
        try:
            decision = decide(await self._reviewer.status(spec))
        except ReviewError as error:
            if not error.of_one:
                self._trouble = f"a SubjectAccessReview failed: {error}"
            raise
        self._trouble = None
        self._answered = self._clock()
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


def is_keepable(info: RequestInfo) -> bool:
    """Whether what the client chose is short enough for the answer to be kept (`shouldCache` of k8s.io/apiserver)."""
    chosen = (
        *(info.namespace, info.verb, info.api_group, info.api_version),
        *(info.resource, info.subresource, info.name, info.path),
    )
    return sum(len(part) for part in chosen) < _LARGEST_KEPT


def decide(status: Json) -> Decision:
    """Read a review's `status`: both allowed and denied is a denial. Raises `ReviewError` when it holds no answer."""
    if not isinstance(status.get("allowed"), bool):
        raise ReviewError("the SubjectAccessReview came back without an answer")
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


def _undecided(error: ReviewError) -> StatusError:
    """`errors.NewInternalError` of k8s.io/apimachinery."""
    cause = f"a SubjectAccessReview failed: {error}"
    return StatusError(500, f"Internal error occurred: {cause}", details={"causes": [{"message": cause}]})


def _quoted(text: str) -> str:
    """As Go's `%q` does it: what can't be printed is escaped, so that no name can pass for more than a name."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if (short := _SHORT_ESCAPES.get(character)) is not None:
        return short
    if character.isprintable():
        return character
    number = ord(character)
    if number < 0x80:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
