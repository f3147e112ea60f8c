"""One of several replicas works at a time, and the next takes over when it goes, by a real Lease."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from controller.leadership import LeadershipLostError, Timing, lead, stand
from hack.clusters.bare import BareControlPlane
from kube.client import LEASES, Client, Json
from kube.status import StatusError

pytestmark = pytest.mark.asyncio(loop_scope="module")

# A lease that outlasts the tests: nothing in them waits for one to run out, except where it says so.
LONG = Timing(lease=600, renew=300, retry=1)
QUICK = Timing(lease=3, renew=2, retry=1)
PATIENCE = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(control_plane: BareControlPlane) -> AsyncIterator[Client]:
    async with Client.connect(user_agent="test", kubeconfig=control_plane.kubeconfig) as client:
        yield client


class Replica:
    """One that leads as soon as it may, and then works until it is told otherwise."""

    def __init__(self, client: Client, name: str, lease: str, timing: Timing = LONG) -> None:
        self.leads = asyncio.Event()
        self.stopped = asyncio.Event()
        self.fails = asyncio.Event()
        self.task: asyncio.Task[Any] = asyncio.create_task(
            lead(client, namespace="default", name=lease, identity=name, work=self._work, timing=timing), name=name
        )

    async def _work(self) -> None:
        self.leads.set()
        try:
            await self.fails.wait()
            raise ZeroDivisionError
        finally:
            self.stopped.set()

    async def stop(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def holder(client: Client, lease: str) -> str:
    found = await client.get(LEASES, lease, namespace="default")
    return str(found["spec"].get("holderIdentity") or "")


async def change(client: Client, lease: str, **spec: Any) -> None:
    """What someone else does to the lease; tried again when it is being renewed at that moment."""
    while True:
        found: Json = await client.get(LEASES, lease, namespace="default")
        try:
            await client.replace(LEASES, lease, found | {"spec": found["spec"] | spec}, namespace="default")
        except StatusError as error:
            if error.code != 409:
                raise
        else:
            return


async def test_one_leads_and_the_next_takes_over_from_a_clean_exit_at_once(client: Client) -> None:
    async with asyncio.timeout(PATIENCE):
        first = Replica(client, "first", "handover")
        await first.leads.wait()
        second = Replica(client, "second", "handover")
        assert await holder(client, "handover") == "first"
        assert not second.leads.is_set()
        await first.stop()
        assert first.stopped.is_set()
        await second.leads.wait()
        assert await holder(client, "handover") == "second"
        await second.stop()
        assert await holder(client, "handover") == ""


async def test_work_that_fails_ends_the_leadership_with_its_error(client: Client) -> None:
    async with asyncio.timeout(PATIENCE):
        replica = Replica(client, "only", "failure")
        await replica.leads.wait()
        replica.fails.set()
        with pytest.RaisesGroup(ZeroDivisionError):
            await replica.task
        assert await holder(client, "failure") == ""


async def test_work_stops_when_someone_else_holds_the_lease(client: Client) -> None:
    async with asyncio.timeout(PATIENCE):
        replica = Replica(client, "robbed", "theft")
        await replica.leads.wait()
        await change(client, "theft", holderIdentity="thief")
        with pytest.RaisesGroup(pytest.RaisesExc(LeadershipLostError, match="thief took the lease")):
            await replica.task
        assert replica.stopped.is_set()
        assert await holder(client, "theft") == "thief"


async def test_who_died_is_succeeded_when_its_lease_has_run_out(client: Client) -> None:
    async with asyncio.timeout(PATIENCE):
        first = Replica(client, "first", "death", QUICK)
        await first.leads.wait()
        await first.stop()
        await change(client, "death", holderIdentity="dead")
        second = Replica(client, "second", "death", QUICK)
        await second.leads.wait()
        assert await holder(client, "death") == "second"
        await second.stop()


class Unreachable:
    """kube-apiserver, which hangs once it is told to."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.hangs = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def call(*arguments: Any, **keywords: Any) -> Any:
            if self.hangs.is_set():
                await asyncio.Event().wait()
            return await method(*arguments, **keywords)

        return call


async def test_work_stops_when_requests_hang(client: Client) -> None:
    async with asyncio.timeout(PATIENCE):
        connection: Any = Unreachable(client)
        replica = Replica(connection, "cut-off", "silence", QUICK)
        await replica.leads.wait()
        connection.hangs.set()
        with pytest.RaisesGroup(pytest.RaisesExc(LeadershipLostError, match="could not be renewed")):
            await replica.task
        assert replica.stopped.is_set()
        assert await holder(client, "silence") == "cut-off"


async def test_who_lost_the_lease_stands_again_and_never_works_twice_at_once(client: Client) -> None:
    begun: list[int] = []
    ended: list[int] = []
    working = asyncio.Event()

    async def work() -> None:
        assert len(begun) == len(ended)
        begun.append(len(begun))
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(len(ended))

    async with asyncio.timeout(PATIENCE):
        standing = asyncio.create_task(
            stand(
                lambda: lead(client, namespace="default", name="again", identity="only", work=work, timing=QUICK),
                identity="only",
            )
        )
        await working.wait()
        working.clear()
        await change(client, "again", holderIdentity="thief")
        await working.wait()
        assert (begun, ended) == ([0, 1], [0])
        assert await holder(client, "again") == "only"
        standing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await standing
        assert ended == [0, 1]


async def test_who_stands_again_does_not_hide_that_the_work_failed(client: Client) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async with asyncio.timeout(PATIENCE):
        with pytest.raises((ZeroDivisionError, ExceptionGroup)) as failed:
            await stand(
                lambda: lead(client, namespace="default", name="failing", identity="only", work=fail, timing=QUICK),
                identity="only",
            )
    assert "ZeroDivisionError" in repr(failed.value)
