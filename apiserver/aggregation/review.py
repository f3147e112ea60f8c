"""What kube-apiserver is asked about users: TokenReviews and SubjectAccessReviews, with patience.

A review changes nothing, so it may be asked again. That is done where k8s.io/apiserver does it
(`util/webhook.DefaultShouldRetry`) and with its pauses. Ours end sooner: all tries together get the ten seconds that
k8s.io/apiserver gives to each.
"""

import asyncio
import errno
import logging
import random
import time
from collections.abc import Awaitable, Callable

import aiohttp

from kube.client import Client, Json, Resource
from kube.status import StatusError

_log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a review takes at most, however often it is tried."""

CREATED = "201"
NO_CODE = "<error>"

_TRIES = 5
_FIRST_PAUSE = 0.5
_GROWTH = 1.5
_JITTER = 0.2

Sleep = Callable[[float], Awaitable[None]]
Observe = Callable[[str, float], None]
"""Is told of each try: the code of its HTTP answer, `<error>` without one, and the seconds that it took."""


def unobserved(_code: str, _seconds: float) -> None:
    """Nobody wants to know."""


class ReviewError(Exception):
    """kube-apiserver gave no answer to a review; the message says why.

    `of_one` is true when that is due to what was asked: other reviews may well be answered.
    """

    def __init__(self, message: str, *, of_one: bool = False) -> None:
        super().__init__(message)
        self.of_one = of_one


class Reviewer:
    """Has one kind of reviews answered."""

    def __init__(
        self, client: Client, resource: Resource, *, sleep: Sleep = asyncio.sleep, observe: Observe = unobserved
    ) -> None:
        self._client = client
        self._resource = resource
        self._sleep = sleep
        self._observe = observe

    async def status(self, spec: Json) -> Json:
        """The `status` of a review of `spec`. Raises `ReviewError`."""
        body = {"apiVersion": self._resource.api_version, "kind": self._resource.kind, "spec": spec}
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await self._asked(body)
        except TimeoutError as error:
            raise ReviewError(f"no answer within {PATIENCE:.0f} s") from error
        except StatusError as error:
            # Bad request, too large, invalid: a user may have a name or groups that Kubernetes can't take.
            raise ReviewError(error.message, of_one=error.code in (400, 413, 422)) from error
        status = answer.get("status")
        if not isinstance(status, dict):
            raise ReviewError(f"the {self._resource.kind} came back without a status")
        return status

    async def _asked(self, body: Json) -> Json:
        pause = _FIRST_PAUSE
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._tried(body)
            except StatusError as error:
                if not tries_left or not is_transient(error):
                    raise
                _log.info("a %s is tried again: %s", self._resource.kind, error.message)
                wanted = pause * random.uniform(1.0, 1.0 + _JITTER)  # noqa: S311
                await self._sleep(max(wanted, error.retry_after or 0))
                pause *= _GROWTH
        raise AssertionError("the last try returns or raises")

    async def _tried(self, body: Json) -> Json:
        began = time.monotonic()
        code = NO_CODE
        try:
            answer = await self._client.create(self._resource, body)
            code = CREATED
        except StatusError as error:
            if error.__cause__ is None:
                code = str(error.code)
            raise
        finally:
            self._observe(code, time.monotonic() - began)
        return answer


def is_transient(error: StatusError) -> bool:
    """Whether k8s.io/apiserver would ask again: `util/webhook.DefaultShouldRetry`.

    That is after a connection that broke, but not when none can be made or when no answer comes.
    """
    if isinstance(error.__cause__, TimeoutError):
        return False
    if error.__cause__ is not None:
        return _was_reset(error.__cause__)
    if error.retry_after:
        return True
    if error.reason == "ServerTimeout":  # which says in its details when to come back, be it at once
        return error.details is not None
    by_code = not error.reason and error.code in (429, 500, 504)
    return by_code or error.reason in ("InternalError", "Timeout", "TooManyRequests")


def _was_reset(cause: BaseException) -> bool:
    # A server that closes a kept connection in the moment in which it is used again is seen as a disconnection.
    if isinstance(cause, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return True
    return isinstance(cause, OSError) and cause.errno in (errno.ECONNRESET, errno.EPIPE)
