"""Admission as a whole: a review goes in, an answer comes out, decided with what is known of policies and users now."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime

from api.capturepolicy import CapturePolicy
from api.verdict import Circumstances
from kube.client import CAPTUREPOLICIES, Client
from kube.status import StatusError, forbidden, internal_error
from kube.watch import Cache
from webhook.access import Access
from webhook.advice import Advice
from webhook.judge import Policies, judge, judge_kept
from webhook.namespaces import Namespaces
from webhook.review import Answer, Request
from webhook.stamp import capture_of, created_of, deserved, kept, put, starts_again

_log = logging.getLogger(__name__)


class Admission:
    """Stamps and judges; own `policies.run()` and `namespaces.run()` in a TaskGroup."""

    def __init__(self, client: Client, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.policies = Cache(client, CAPTUREPOLICIES, CapturePolicy.model_validate)
        self.namespaces = Namespaces(client)
        self._access = Access(client)
        self._advice = Advice(client, self._access)
        self._clock = clock

    async def stamp(self, request: Request) -> Answer:
        """The mutating half. What it can't decide it leaves without a stamp, and the validating half says why."""
        if not request.is_ours:
            return Answer()
        if (expected := kept(request)) is not None:
            return put(request, expected.annotation)
        if starts_again(request, self._clock()):
            return put(request, None)
        try:
            usable = (await self._policies(request)).usable
            circumstances = await self._circumstances(request, usable)
        except StatusError as error:
            _log.warning("%s/%s is not stamped: %s", request.namespace, request.name, error.message)
            return put(request, None)
        return put(request, deserved(request, usable, circumstances))

    async def judge(self, request: Request) -> Answer:
        """The validating half; its verdicts are logged. What can't be decided is refused with code 500."""
        if not request.is_ours:
            return Answer()
        answer = await self._judge(request)
        _log.info(
            "allowed" if answer.refusal is None else f"denied: {answer.refusal.message}",
            extra={
                "user": request.user_info.username,
                "operation": request.operation,
                "namespace": request.namespace,
                "capture": request.name,
                "allowed": answer.refusal is None,
                "policy": answer.audit.get("policy", ""),
                "rule": answer.audit.get("rule", ""),
            },
        )
        return answer

    async def _judge(self, request: Request) -> Answer:
        if (expected := kept(request)) is not None:
            return judge_kept(request, expected)
        if starts_again(request, self._clock()):
            return Answer(refusal=forbidden(_STARTED), audit={"rule": "started"})
        try:
            policies = await self._policies(request)
            circumstances = await self._circumstances(request, policies.usable)
        except StatusError as error:
            return Answer(refusal=error, audit={"rule": "undecidable"})
        answer = judge(request, policies, circumstances)
        if answer.refusal is not None or request.operation != "CREATE":
            return answer
        spec = capture_of(request).spec
        advice = await self._advice.on(spec, user=request.user_info, namespace=request.namespace)
        return replace(answer, warnings=[*answer.warnings, *advice])

    async def _policies(self, request: Request) -> Policies:
        if not self.policies.is_synced:
            raise internal_error("the policies are not known yet: try again in a moment")
        usable = await self._access.usable(
            self.policies.objects.values(), user=request.user_info, namespace=request.namespace
        )
        return Policies(
            usable=usable,
            existing=[key.name for key in self.policies.objects],
            unreadable=[key.name for key in self.policies.unparsable],
        )

    async def _circumstances(self, request: Request, usable: Iterable[CapturePolicy]) -> Circumstances:
        """What the verdict depends on besides. Raises `StatusError` (500) when it is not known."""
        asks_for_labels = any(policy.spec.namespace_selector is not None for policy in usable)
        return Circumstances(
            now=self._clock(),
            created=created_of(request),
            namespace_labels=await self.namespaces.labels(request.namespace) if asks_for_labels else None,
        )


_STARTED = "a capture that has started can't start later: create another one"
