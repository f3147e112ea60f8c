"""Which policies a user may `use`: kube-apiserver's own answer, by RBAC or whatever else authorizes there."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from api.capturepolicy import CapturePolicy
from api.object import GROUP
from kube.answers import Answers, fingerprint
from kube.client import SUBJECTACCESSREVIEWS, Client, Json
from kube.status import StatusError, internal_error
from webhook.review import User

_PATIENCE = 2.0
"""Seconds; kube-apiserver gives the whole review five."""
_ALLOWED_FOR = 10.0
_DENIED_FOR = 2.0
"""Seconds; short, because who was just given a right tries again at once."""
_ANSWERS = 4096
_AT_ONCE = 16


class Access:
    """Asks by SubjectAccessReview, and keeps a yes for ten seconds and a no for two."""

    def __init__(self, client: Client, *, clock: Callable[[], float] | None = None) -> None:
        self._client = client
        keeping: dict[str, Any] = {"clock": clock} if clock is not None else {}
        self._answers: Answers[bytes, bool] = Answers(
            lifetime=lambda allowed: _ALLOWED_FOR if allowed else _DENIED_FOR, size=_ANSWERS, **keeping
        )
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def usable(self, policies: Iterable[CapturePolicy], *, user: User, namespace: str) -> list[CapturePolicy]:
        """Those policies that the user may `use` in the namespace. Raises `StatusError` (500) when it can't be told."""
        asked = list(policies)
        answers = await asyncio.gather(
            *(self._may_use(policy.metadata.name, user=user, namespace=namespace) for policy in asked)
        )
        return [policy for policy, allowed in zip(asked, answers, strict=True) if allowed]

    async def _may_use(self, policy: str, *, user: User, namespace: str) -> bool:
        spec = _spec(policy, user=user, namespace=namespace)
        return await self._answers.get(fingerprint(spec), lambda: self._ask(spec))

    async def _ask(self, spec: Json) -> bool:
        body = {"apiVersion": SUBJECTACCESSREVIEWS.api_version, "kind": SUBJECTACCESSREVIEWS.kind, "spec": spec}
        try:
            async with asyncio.timeout(_PATIENCE), self._places:
                answer = await self._client.create(SUBJECTACCESSREVIEWS, body)
            return _allowed(answer.get("status"))
        except (StatusError, TimeoutError, ValueError) as error:
            failure = str(error) or "no answer in time"
            policy = spec["resourceAttributes"]["name"]
            raise internal_error(
                f"it can't be told whether {spec['user']} may use policy {policy}: {failure}"
            ) from error


def _spec(policy: str, *, user: User, namespace: str) -> Json:
    """All of what kube-apiserver decides by."""
    spec: Json = {
        "user": user.username,
        "resourceAttributes": {
            "verb": "use",
            "group": GROUP,
            "resource": "capturepolicies",
            "name": policy,
            "namespace": namespace,
        },
    }
    if user.uid:
        spec["uid"] = user.uid
    if user.groups:
        spec["groups"] = list(user.groups)
    if user.extra:
        spec["extra"] = {key: list(values) for key, values in user.extra.items()}
    return spec


def _allowed(status: object) -> bool:
    """Allowed together with denied is a denial. Raises `ValueError` when it holds no answer."""
    if not isinstance(status, dict) or not isinstance(status.get("allowed"), bool):
        raise ValueError("the review has no status")  # noqa: TRY004 - what was read is wrong, not our call
    return status["allowed"] and status.get("denied") is not True
