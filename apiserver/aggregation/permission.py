"""How long a permission lasts: for as long as it is renewed, while the request that it allows goes on.

A download or a watch may last for hours, and what allowed it may be taken back meanwhile. So its user is confirmed and
its authorization asked for again every few seconds. Each time extends the permission a little; when it is refused, or
was not given for too long, the request ends where it is. Whoever asks last, and whatever hangs or fails, a permission
that is not renewed runs out.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from apiserver.aggregation.authentication import Authenticated, Authenticator
from apiserver.aggregation.authorization import LIFETIME, Authorizer
from apiserver.aggregation.requestinfo import RequestInfo
from apiserver.aggregation.review import PATIENCE
from kube.status import StatusError, internal_error

_log = logging.getLogger(__name__)

REVOKED_WITHIN = 30.0
"""Seconds after which nothing flows any more on a permission that was taken back."""

# An answer may be as old as the caches keep it, or as one that is waited for together with others takes.
_DURATION = REVOKED_WITHIN - max(LIFETIME, PATIENCE)
_INTERVAL = 5.0


@dataclass(slots=True, eq=False)
class _Permission:
    authenticated: Authenticated
    info: RequestInfo
    until: asyncio.Timeout
    trouble: StatusError | None = None


class Permissions:
    """Keeps up the permissions of requests under way. Times in seconds."""

    def __init__(
        self,
        authenticator: Authenticator,
        authorizer: Authorizer,
        *,
        interval: float = _INTERVAL,
        duration: float = _DURATION,
    ) -> None:
        """One is renewed every `interval`, and lasts for `duration` from the moment in which that was begun."""
        self._authenticator = authenticator
        self._authorizer = authorizer
        self._interval = interval
        self._duration = duration

    @asynccontextmanager
    async def upheld(self, authenticated: Authenticated, info: RequestInfo, *, since: float) -> AsyncIterator[None]:
        """Run the block, which has just been allowed, while it stays so.

        `since` is when that was begun to be asked, in the loop's time: an answer may have been old when the last came.
        Raises `StatusError` in its place when it does not: 401 and 403 as for a new request, 500 when nothing could be
        told for too long.
        """
        failure: Exception | None = None
        until = asyncio.timeout_at(since + self._duration)
        permission = _Permission(authenticated, info, until)
        try:
            async with until, asyncio.TaskGroup() as tasks:
                renewing = tasks.create_task(self._renew(permission), name=f"permission of {authenticated.user.name}")
                try:
                    yield
                except Exception as error:
                    failure = error  # raised below, since the group would wrap it
                finally:
                    renewing.cancel()
        except TimeoutError:
            raise self._ended(permission) from None
        if failure is not None:
            raise failure

    def _ended(self, permission: _Permission) -> StatusError:
        reason = permission.trouble or internal_error("Internal error occurred: the permission was not renewed in time")
        info, user = permission.info, permission.authenticated.user
        _log.warning("%r is no longer let %s %s: %s", user.name, info.verb, info.path, reason.message)
        return reason

    async def _renew(self, permission: _Permission) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._interval)
            began = loop.time()
            try:
                user = await self._authenticator.confirm(permission.authenticated)
                await self._authorizer.authorize(user, permission.info)
            except StatusError as error:
                permission.trouble = error
                if error.code == 500:
                    continue  # it can't be told: what was allowed last runs out by itself
                permission.until.reschedule(began)
                return
            permission.trouble = None
            permission.until.reschedule(began + self._duration)
