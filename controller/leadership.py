"""Work that only one of several replicas may do at a time: whoever holds the Lease.

The election is kubernetes-asyncio's. Around it: errors of kube-apiserver mean "not now" and never end the process, work
that fails ends it, a lease that could not be renewed in time stops the work until it is won again, and a clean exit
gives the lease back, so that the next replica need not wait for it to run out.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubernetes_asyncio.client.exceptions import ApiException
from kubernetes_asyncio.leaderelection.electionconfig import Config
from kubernetes_asyncio.leaderelection.leaderelection import LeaderElection
from kubernetes_asyncio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes_asyncio.leaderelection.resourcelock.baselock import BaseLock

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
    lock = LeaseLock(client, namespace=namespace, name=name, identity=identity)
    election = LeaderElection(
        Config(
            lock,
            lease_duration=timing.lease,
            renew_deadline=timing.renew,
            retry_period=timing.retry,
            onstarted_leading=work,
            onstopped_leading=work,  # neither is called by us: `run` would not notice the end of the work
        )
    )
    try:
        await election.acquire()
        _log.info("%s leads", identity)
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(_renew(election, lock, timing), name="renewing the lease")
            await work()
            renewing.cancel()
    finally:
        await lock.release()


async def stand(attempt: Callable[[], Coroutine[Any, Any, None]], *, identity: str) -> None:
    """`attempt` to lead, again and again when the lease was lost: what it did is over then. Raises what it raises."""
    while True:
        try:
            await attempt()
        except* LeadershipLostError as lost:
            _log.warning("%s leads no more: %s", identity, "; ".join(str(error) for error in lost.exceptions))
        else:
            return


async def _renew(election: LeaderElection, lock: "LeaseLock", timing: Timing) -> None:
    """Renew until that fails. The election's own deadline does not cut off a request that hangs; this one does."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timing.renew) as limit:
            lock.on_renewal = lambda: limit.reschedule(loop.time() + timing.renew)
            await election.renew_loop()
    except TimeoutError:
        pass
    raise LeadershipLostError(f"the lease could not be renewed for {timing.renew:.0f} s")


class LeaseLock(BaseLock):
    """A Lease (coordination.k8s.io/v1), as the election wants it. Its times are for people: nobody compares clocks."""

    def __init__(self, client: Client, *, namespace: str, name: str, identity: str) -> None:
        super().__init__(name, namespace, identity)
        self._client = client
        self._lease: Json = {}
        self._held = False
        self.on_renewal: Callable[[], None] = lambda: None

    async def get(
        self, name: str, namespace: str
    ) -> tuple[bool, LeaderElectionRecord] | tuple[bool, Exception] | tuple[bool, None]:
        """Raises `LeadershipLostError` when it was ours and is someone else's."""
        try:
            self._lease = await self._client.get(LEASES, name, namespace=namespace)
        except StatusError as error:
            if error.code != 404:
                _log.warning("the lease can't be read: %s", error.message)
            return False, _api_exception(error)
        spec = self._lease.get("spec") or {}
        holder = spec.get("holderIdentity") or None
        if self._held and holder not in (None, self.identity):
            self._held = False
            raise LeadershipLostError(f"{holder} took the lease")
        seconds = spec.get("leaseDurationSeconds")
        return True, LeaderElectionRecord(
            holder, str(seconds) if seconds else None, spec.get("acquireTime"), spec.get("renewTime")
        )

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        lease = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": name},
            "spec": self._spec({}, election_record),
        }
        return await self._written(lambda: self._client.create(LEASES, lease, namespace=namespace))

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        lease = self._lease | {"spec": self._spec(self._lease.get("spec") or {}, updated_record)}
        return await self._written(lambda: self._client.replace(LEASES, name, lease, namespace=namespace))

    async def release(self) -> None:
        """Give the lease back if it is ours. When that fails it runs out by itself."""
        try:
            async with asyncio.timeout(_RELEASE_PATIENCE):
                lease = await self._client.get(LEASES, self.name, namespace=self.namespace)
                spec = lease.get("spec") or {}
                if spec.get("holderIdentity") == self.identity:
                    released = lease | {"spec": spec | {"holderIdentity": ""}}
                    await self._client.replace(LEASES, self.name, released, namespace=self.namespace)
                    _log.info("%s gave the lease back", self.identity)
        except (StatusError, TimeoutError) as error:
            _log.warning("the lease was not given back: %s", str(error) or "no answer in time")

    async def _written(self, write: Callable[[], Coroutine[Any, Any, Json]]) -> bool:
        try:
            self._lease = await write()
        except StatusError as error:
            if error.code != 409:  # someone was faster: that is how an election goes
                _log.warning("the lease can't be written: %s", error.message)
            return False
        self._held = True
        self.on_renewal()
        return True

    def _spec(self, old: Json, record: LeaderElectionRecord) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        taken = old.get("holderIdentity") != self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": round(float(record.lease_duration or 0)),
            "acquireTime": now if taken else old.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + taken,
        }


def _api_exception(error: StatusError) -> ApiException:
    """What the election looks into to tell a lease that is not there from one that can't be read."""
    exception = ApiException(status=error.code, reason=error.message)
    exception.body = json.dumps({"code": error.code}).encode()
    return exception
