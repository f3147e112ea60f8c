"""Work that only one of several replicas may do at a time: whoever holds the Lease.

The election is client-go's (`k8s.io/client-go/tools/leaderelection`). No clock is compared with another's, nor trusted
to go evenly: whether a lease has run out is measured from when this replica saw it change, by a clock that nobody sets.
Errors of kube-apiserver mean "not now" and never end the process, work that fails ends it, a lease that could not be
renewed in time stops the work until it is won again, and a clean exit gives the lease back, so that the next replica
need not wait for it to run out.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from kube.client import LEASES, Client, Json
from kube.status import StatusError

_log = logging.getLogger(__name__)

_RELEASE_PATIENCE = 3.0


class LeadershipLostError(Exception):
    """The lease could not be renewed, or someone else holds it: another replica may be at work."""


@dataclass(frozen=True, slots=True)
class Timing:
    """In seconds. The holder stops `renew` after the last renewal, before others take over after `lease`."""

    lease: float = 15.0
    renew: float = 10.0
    retry: float = 2.0


async def lead(
    client: Client,
    *,
    namespace: str,
    name: str,
    identity: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    timing: Timing = Timing(),
) -> None:
    """Wait for the lease, then run `work` for as long as it is held; give it back on the way out, whatever the way.

    Raises `LeadershipLostError`, or what `work` raises, in an `ExceptionGroup`.
    """
    clock = asyncio.get_running_loop().time
    lease = Lease(client, namespace=namespace, name=name, identity=identity, seconds=timing.lease, clock=clock)
    try:
        held_since = await _won(lease, timing)
        _log.info("%s leads", identity)
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(_renew(lease, timing, held_since=held_since), name="renewing the lease")
            await work()
            renewing.cancel()
    finally:
        await lease.release()


async def stand(attempt: Callable[[], Coroutine[Any, Any, None]], *, identity: str) -> None:
    """`attempt` to lead, again and again when the lease was lost: what it did is over then. Raises what it raises."""
    while True:
        try:
            await attempt()
        except* LeadershipLostError as lost:
            _log.warning("%s leads no more: %s", identity, "; ".join(str(error) for error in lost.exceptions))
        else:
            return


async def _won(lease: "Lease", timing: Timing) -> float:
    """Try until the lease is held; returns the loop's time from before it was written, as others count from then."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        if await lease.hold():
            return began
        await asyncio.sleep(timing.retry)


async def _renew(lease: "Lease", timing: Timing, *, held_since: float) -> NoReturn:
    """Renew until that fails for too long; a request that hangs is cut off as well."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(held_since + timing.renew) as limit:
            while True:
                await asyncio.sleep(timing.retry)
                began = loop.time()
                if await lease.hold():
                    limit.reschedule(began + timing.renew)
    except TimeoutError:
        raise LeadershipLostError(f"the lease could not be renewed for {timing.renew:.0f} s") from None


class Lease:
    """A Lease (coordination.k8s.io/v1) and what is known of it. The times in it are for people: nobody compares them.

    `clock` gives seconds and never jumps.
    """

    def __init__(
        self,
        client: Client,
        *,
        namespace: str,
        name: str,
        identity: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seconds = seconds
        self._clock = clock
        self._seen: Json | None = None
        self._seen_at = 0.0
        self._held = False

    async def hold(self) -> bool:
        """Take the lease, or renew it. False when it is someone else's, or when kube-apiserver does not let us.

        Raises `LeadershipLostError` when it was ours and is someone else's.
        """
        try:
            lease = await self._client.get(LEASES, self._name, namespace=self._namespace)
        except StatusError as error:
            if error.code == 404:
                return await self._create()
            _log.warning("the lease can't be read: %s", error.message)
            return False
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if self._held and holder not in ("", self._identity):
            self._held = False
            raise LeadershipLostError(f"{holder} took the lease")
        if holder not in ("", self._identity) and not self._has_run_out(spec):
            return False
        taken = lease | {"spec": spec | self._spec(spec)}
        return await self._written(self._client.replace(LEASES, self._name, taken, namespace=self._namespace))

    async def release(self) -> None:
        """Give the lease back if it is ours. When that fails it runs out by itself."""
        try:
            async with asyncio.timeout(_RELEASE_PATIENCE):
                lease = await self._client.get(LEASES, self._name, namespace=self._namespace)
                spec = lease.get("spec") or {}
                if spec.get("holderIdentity") == self._identity:
                    released = lease | {"spec": spec | {"holderIdentity": ""}}
                    await self._client.replace(LEASES, self._name, released, namespace=self._namespace)
                    _log.info("%s gave the lease back", self._identity)
        except (StatusError, TimeoutError) as error:
            _log.warning("the lease was not given back: %s", str(error) or "no answer in time")

    def _has_run_out(self, spec: Json) -> bool:
        """Whether the holder has let pass the time that it gave itself, since we last saw a change of it."""
        if spec != self._seen:
            self._seen, self._seen_at = spec, self._clock()
        return self._clock() - self._seen_at >= float(spec.get("leaseDurationSeconds") or self._seconds)

    async def _create(self) -> bool:
        lease = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._name},
            "spec": self._spec({}),
        }
        return await self._written(self._client.create(LEASES, lease, namespace=self._namespace))

    async def _written(self, write: Coroutine[Any, Any, Json]) -> bool:
        try:
            await write
        except StatusError as error:
            if error.code != 409:  # someone was faster: that is how an election goes
                _log.warning("the lease can't be written: %s", error.message)
            return False
        self._held = True
        return True

    def _spec(self, old: Json) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        taken = old.get("holderIdentity") != self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": round(self._seconds),
            "acquireTime": now if taken else old.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + taken,
        }
