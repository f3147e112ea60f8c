"""What a user may do, above all which policies they may `use`: kube-apiserver's own answer, by RBAC or whatever else
authorizes there.
"""

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

_Key = tuple[bytes, str, str | None]
"""A user's fingerprint, the namespace, and the policy to use; None for listing pods."""


class Access:
    """Asks by SubjectAccessReview, and keeps a yes for ten seconds and a no for two."""

    def __init__(self, client: Client, *, clock: Callable[[], float] | None = None) -> None:
        self._client = client
        keeping: dict[str, Any] = {"clock": clock} if clock is not None else {}
        self._answers: Answers[_Key, bool] = Answers(
            lifetime=lambda allowed: _ALLOWED_FOR if allowed else _DENIED_FOR, size=_ANSWERS, **keeping
        )
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def usable(self, policies: Iterable[CapturePolicy], *, user: User, namespace: str) -> list[CapturePolicy]:
        """Those policies that the user may `use` in the namespace. Raises `StatusError` (500) when it can't be told."""
        asker = fingerprint(_asker(user))
        asked = {policy.metadata.name: policy for policy in policies}
        keys = {name: (asker, namespace, name) for name in asked}
        kept = {name: self._answers.kept(key) for name, key in keys.items()}
        missing = [name for name, answer in kept.items() if answer is None]
        answers = await asyncio.gather(
            *(self._may(user, key=keys[name], attributes=_use(name, namespace)) for name in missing)
        )
        allowed = kept | dict(zip(missing, answers, strict=True))
        return [policy for name, policy in asked.items() if allowed[name]]

    async def may_list_pods(self, *, user: User, namespace: str) -> bool:
        """Raises `StatusError` (500) when it can't be told."""
        attributes = {"verb": "list", "group": "", "resource": "pods", "namespace": namespace}
        return await self._may(user, key=(fingerprint(_asker(user)), namespace, None), attributes=attributes)

    async def _may(self, user: User, *, key: _Key, attributes: Json) -> bool:
        return await self._answers.get(key, lambda: self._ask(_asker(user) | {"resourceAttributes": attributes}))

    async def _ask(self, spec: Json) -> bool:
        body = {"apiVersion": SUBJECTACCESSREVIEWS.api_version, "kind": SUBJECTACCESSREVIEWS.kind, "spec": spec}
        try:
            async with asyncio.timeout(_PATIENCE), self._places:
                answer = await self._client.create(SUBJECTACCESSREVIEWS, body)
            return _allowed(answer.get("status"))
        except (StatusError, TimeoutError, ValueError) as error:
            failure = str(error) or "no answer in time"
            attributes = spec["resourceAttributes"]
            what = " ".join(attributes[part] for part in ("verb", "resource", "name") if part in attributes)
            raise internal_error(f"it can't be told whether {spec['user']} may {what}: {failure}") from error


def _asker(user: User) -> Json:
    """All of a user that kube-apiserver decides by."""
    spec: Json = {"user": user.username}
    if user.uid:
        spec["uid"] = user.uid
    if user.groups:
        spec["groups"] = list(user.groups)
    if user.extra:
        spec["extra"] = {key: list(values) for key, values in user.extra.items()}
    return spec


def _use(policy: str, namespace: str) -> Json:
    return {"verb": "use", "group": GROUP, "resource": "capturepolicies", "name": policy, "namespace": namespace}


def _allowed(status: object) -> bool:
    """Allowed together with denied is a denial. Raises `ValueError` when it holds no answer."""
    if not isinstance(status, dict) or not isinstance(status.get("allowed"), bool):
        raise ValueError("the review has no status")  # noqa: TRY004 - what was read is wrong, not our call
    return status["allowed"] and status.get("denied") is not True
