"""Who holds the lease, whatever the replicas' clocks say."""

import asyncio
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from controller import leadership
from controller.leadership import LeadershipLostError, Lease, lead, stand
from kube.client import Client, Json, Resource
from kube.status import StatusError
from tests.ahead import run

SECONDS = 15.0


class Cluster:
    """The one Lease, as kube-apiserver keeps it: a write that does not know the last one is a conflict."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0

    async def get(self, _: Resource, name: str, **__: Any) -> Json:
        if self.lease is None:
            raise StatusError(404, f"{name} not found")
        return self.lease

    async def create(self, _: Resource, body: Json, **__: Any) -> Json:
        if self.lease is not None:
            raise StatusError(409, "exists")
        return self._store(body)

    async def replace(self, _: Resource, __: str, body: Json, **___: Any) -> Json:
        if body["metadata"]["resourceVersion"] != str(self.version):
            raise StatusError(409, "conflict")
        return self._store(body)

    def _store(self, body: Json) -> Json:
        self.version += 1
        self.lease = body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
        return self.lease


class Clock:
    """Seconds that only go forward."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Wall:
    """Stands in for `datetime`: the clock on the wall, which people and NTP set."""

    moment = datetime(2030, 1, 1, tzinfo=UTC)

    @classmethod
    def now(cls, _: object) -> datetime:
        return cls.moment


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def replica(cluster: Cluster, clock: Clock, name: str) -> Lease:
    client = cast("Client", cluster)
    return Lease(client, namespace="kubepcap", name="lease", identity=name, seconds=SECONDS, clock=clock)


async def test_the_first_holds_and_the_other_waits_until_the_lease_has_run_out(cluster: Cluster, clock: Clock) -> None:
    first, second = replica(cluster, clock, "first"), replica(cluster, clock, "second")
    assert await first.hold()
    assert not await second.hold()
    clock.seconds += SECONDS - 1
    assert not await second.hold()
    clock.seconds += 1
    assert await second.hold()
    with pytest.raises(LeadershipLostError, match="second took the lease"):
        await first.hold()


async def test_a_lease_that_is_renewed_does_not_run_out(cluster: Cluster, clock: Clock) -> None:
    first, second = replica(cluster, clock, "first"), replica(cluster, clock, "second")
    for _ in range(20):
        assert await first.hold()
        assert not await second.hold()
        clock.seconds += SECONDS - 1
    assert cluster.lease is not None
    assert cluster.lease["spec"]["leaseTransitions"] == 1


async def test_who_looks_late_waits_a_whole_lease(cluster: Cluster, clock: Clock) -> None:
    """When it was renewed last can't be known: its times are another clock's."""
    first, second = replica(cluster, clock, "first"), replica(cluster, clock, "second")
    assert await first.hold()
    clock.seconds += 10 * SECONDS
    assert not await second.hold()
    clock.seconds += SECONDS
    assert await second.hold()


@pytest.mark.parametrize("minutes", [5, -5, 60 * 24 * 365])
async def test_a_clock_that_jumps_neither_takes_nor_loses_the_lease(
    cluster: Cluster, clock: Clock, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    monkeypatch.setattr(leadership, "datetime", Wall)
    first, second = replica(cluster, clock, "first"), replica(cluster, clock, "second")
    assert await first.hold()
    assert not await second.hold()
    monkeypatch.setattr("time.time", lambda: 2e9 + minutes * 60)
    monkeypatch.setattr(Wall, "moment", datetime.fromtimestamp(2e9 + minutes * 60, UTC))
    clock.seconds += 2
    assert not await second.hold()
    assert await first.hold()
    clock.seconds += SECONDS
    assert not await second.hold()  # it saw the renewal only now
    clock.seconds += SECONDS
    assert await second.hold()


async def test_a_lease_given_back_is_taken_at_once(cluster: Cluster, clock: Clock) -> None:
    first, second = replica(cluster, clock, "first"), replica(cluster, clock, "second")
    assert await first.hold()
    await first.release()
    assert await second.hold()
    await first.release()
    assert cluster.lease is not None
    assert cluster.lease["spec"]["holderIdentity"] == "second"


async def test_of_two_that_write_at_once_one_holds(cluster: Cluster, clock: Clock) -> None:
    first, second = replica(cluster, clock, "first"), replica(cluster, clock, "second")
    assert await first.hold()
    await first.release()
    released = cluster.lease
    assert await first.hold()

    async def stale(*_: Any, **__: Any) -> Json:
        assert released is not None
        return released

    fresh, cluster.get = cluster.get, stale  # type: ignore[method-assign]
    assert not await second.hold()
    cluster.get = fresh  # type: ignore[method-assign]
    assert not await second.hold()
    assert await first.hold()


class Fading:
    """The same Lease for one replica, whose requests fail after its first renewal: that was answered late."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._renewals = 0

    async def get(self, resource: Resource, name: str, **options: Any) -> Json:
        if self._renewals:
            raise StatusError(503, "unavailable")
        return await self._cluster.get(resource, name, **options)

    async def create(self, resource: Resource, body: Json, **options: Any) -> Json:
        return await self._cluster.create(resource, body, **options)

    async def replace(self, resource: Resource, name: str, body: Json, **options: Any) -> Json:
        answer = await self._cluster.replace(resource, name, body, **options)
        self._renewals += 1
        await asyncio.sleep(7.5)
        return answer


def test_who_could_not_renew_stops_before_another_begins_however_late_the_last_answer_came() -> None:
    cluster = Cluster()
    story: list[str] = []

    async def compete(name: str, client: Cluster | Fading) -> None:
        async def work() -> None:
            story.append(f"{name} begins")
            try:
                await asyncio.Event().wait()
            finally:
                story.append(f"{name} stops")

        async def attempt() -> None:
            await lead(cast("Client", client), namespace="kubepcap", name="lease", identity=name, work=work)

        await stand(attempt, identity=name)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(compete("first", Fading(cluster)), name="first")
            await asyncio.sleep(1)
            second = tasks.create_task(compete("second", cluster), name="second")
            await asyncio.sleep(60)
            first.cancel()
            second.cancel()

    run(main())
    assert story[:3] == ["first begins", "first stops", "second begins"]
