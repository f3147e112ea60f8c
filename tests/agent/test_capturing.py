"""The agent's side of the capturer, with a real capturer on the other."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from agent.capturer.protocol import (
    Changed,
    Reply,
    Report,
    Start,
    State,
    Stop,
    Target,
    TargetStatus,
    decode,
    encode,
)
from agent.capturing import Capturer, CapturerError, _Failure, _pause_after
from tests.agent import world
from tests.agent.world import Pod

PATIENCE = 20
UID = "5e6e5a3c-7b1c-4b53-9a0e-0d3c6a3c1f10"


class Client:
    """The real client, with what it was told."""

    def __init__(self, path: Path) -> None:
        self.ended: list[TargetStatus] = []
        self.told: list[TargetStatus] = []
        self.lost: list[TargetStatus] = []
        self.capturer = Capturer(path, on_status=self.told.append, on_end=self.ended.append, on_lost=self.lost.extend)

    def state(self, target_id: str) -> State | None:
        status = self.capturer.status(target_id)
        return status.state if status else None


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.01)


@pytest.fixture
async def client(capturer: world.Capturer) -> AsyncIterator[Client]:
    made = Client(capturer.directory / "capturer.sock")
    task = asyncio.create_task(made.capturer.run())
    await made.capturer.known()
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_what_is_wanted_is_captured_and_nothing_else(client: Client, pod: Pod) -> None:
    first, second = pod.target(), pod.target()
    client.capturer.want({first.id: first})
    await eventually(lambda: client.state(first.id) is State.CAPTURING)
    client.capturer.want({second.id: second})
    await eventually(lambda: client.state(second.id) is State.CAPTURING and client.ended)
    (ended,) = client.ended
    assert (ended.target, ended.state) == (first, State.STOPPED)
    assert [run.target for run in client.capturer.running()] == [second]


async def test_a_target_that_changed_is_captured_anew(client: Client, pod: Pod) -> None:
    target = pod.target()
    changed = pod.target(capture_uid=target.capture_uid, filter="tcp")
    client.capturer.want({target.id: target})
    await eventually(lambda: client.state(target.id) is State.CAPTURING)
    client.capturer.want({target.id: changed})
    await eventually(lambda: [run.target for run in client.capturer.running()] == [changed])
    await eventually(lambda: client.state(target.id) is State.CAPTURING)
    assert [status.target for status in client.ended] == [target]


async def test_after_the_workers_death_all_is_captured_again(
    client: Client, capturer: world.Capturer, pod: Pod
) -> None:
    target = pod.target()
    client.capturer.want({target.id: target})
    await eventually(lambda: client.state(target.id) is State.CAPTURING)
    (before,) = client.capturer.running()
    os.kill(capturer.worker_pid(), signal.SIGKILL)
    await eventually(lambda: client.ended)
    await eventually(lambda: client.state(target.id) is State.CAPTURING)
    (after,) = client.capturer.running()
    assert client.ended == client.lost == [before]
    assert client.capturer.restarts == 1
    assert after.started != before.started


async def test_an_end_that_moves_restarts_nothing(client: Client, pod: Pod) -> None:
    now = time.time()
    first = pod.target(until=now + 1000)
    client.capturer.want({first.id: first})
    await eventually(lambda: client.state(first.id) is State.CAPTURING)
    (before,) = client.capturer.running()
    for until in (now + 500, now + 2000, None):
        moved = replace(first, until=until)
        client.capturer.want({first.id: moved})
        await eventually(lambda: {run.target.until for run in client.capturer.running()} == {until})  # noqa: B023
    (after,) = client.capturer.running()
    assert after.started == before.started
    past = replace(first, until=now - 1)
    client.capturer.want({first.id: past})
    await eventually(lambda: client.ended)
    assert client.ended[0].started == before.started
    assert client.lost == []


async def test_what_changes_is_told_with_all_files_of_the_run(client: Client, pod: Pod) -> None:
    target = pod.target(max_file_bytes=20_000, max_files=50)
    client.capturer.want({target.id: target})
    await eventually(lambda: client.state(target.id) is State.CAPTURING)
    await asyncio.to_thread(pod.receive, 1000)
    await client.capturer.refresh(flush=True)
    run = client.told[-1]
    assert sum(interface.packets for interface in run.interfaces) == 1000
    for status in client.told:
        for interface in status.interfaces:
            assert sum(file.packets for file in interface.files) == interface.packets
            assert [file.name for file in interface.files] == sorted(file.name for file in interface.files)


async def test_an_agent_that_was_restarted_takes_up_what_runs(
    client: Client, capturer: world.Capturer, pod: Pod
) -> None:
    target = pod.target()
    client.capturer.want({target.id: target})
    await eventually(lambda: client.state(target.id) is State.CAPTURING)
    other = Client(capturer.directory / "capturer.sock")
    task = asyncio.create_task(other.capturer.run())
    await other.capturer.known()
    await other.capturer.refresh()  # until it knows what it wants it stops nothing
    other.capturer.want({target.id: target})
    assert [run.started for run in other.capturer.running()] == [run.started for run in client.capturer.running()]
    await other.capturer.refresh([target.id], flush=True)
    assert client.ended == other.ended == []
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_what_failed_is_tried_again_and_says_why_meanwhile(client: Client, pod: Pod) -> None:
    target = pod.target(interfaces=("later",))
    client.capturer.want({target.id: target})
    await eventually(lambda: len(client.ended) >= 2)
    status = client.capturer.status(target.id)
    assert status is not None
    assert (status.state, status.reason) == (State.FAILED, "InterfaceNotFound")
    world.run("ip", "-n", pod.namespace, "link", "set", "eth0", "name", "later", "up")
    world.run("ip", "-n", pod.namespace, "link", "set", "later", "up")
    await eventually(lambda: client.state(target.id) is State.CAPTURING)


Answer = Callable[[Start | Stop | Report, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def played(path: Path, answer: Answer) -> AsyncIterator[Client]:
    """A client whose capturer is what the test says."""
    closed = asyncio.Event()

    async def capturer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                message = decode(line)
                assert isinstance(message, Start | Stop | Report)
                await answer(message, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        closed.set()

    client = Client(path)
    async with await asyncio.start_unix_server(capturer, path):
        task = asyncio.create_task(client.capturer.run())
        yield client
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await closed.wait()


async def test_who_starts_well_and_fails_at_once_is_tried_again_less_and_less_often(tmp_path: Path) -> None:
    """As on a disk that is all but full."""
    begun: list[float] = []
    target = Target(capture_uid=UID, pod_uid=UID, pod_name="web-0", pod_addresses=("10.0.0.1",))

    async def answer(message: Start | Stop | Report, writer: asyncio.StreamWriter) -> None:
        statuses: tuple[TargetStatus, ...] = ()
        if isinstance(message, Start):
            begun.append(time.monotonic())
            statuses = (TargetStatus(target=message.target, started=len(begun), state=State.CAPTURING),)
        failed = TargetStatus(target=target, started=len(begun), state=State.FAILED, reason="WriteFailed")
        if isinstance(message, Stop):
            statuses = (failed,)
        writer.write(encode(Reply(request=message.request, worker=1, targets=statuses)))
        if isinstance(message, Start):
            await asyncio.sleep(0.05)
            writer.write(encode(Changed(target=failed)))

    async with played(tmp_path / "capturer.sock", answer) as client:
        client.capturer.want({target.id: target})
        await eventually(lambda: len(client.lost) == 2)  # each gap is told of once, when it is over
    pauses = [after - before for before, after in pairwise(begun)]
    assert len(pauses) == 2
    assert pauses[0] >= 0.5
    assert pauses[1] >= 1.0


async def test_a_change_that_comes_together_with_an_answer_is_not_undone_by_it(tmp_path: Path) -> None:
    target = Target(capture_uid=UID, pod_uid=UID, pod_name="web-0", pod_addresses=("10.0.0.1",))
    begun = TargetStatus(target=target, started=1, state=State.CAPTURING)
    failed = replace(begun, state=State.FAILED, reason="InterfaceFailed")
    stopped = asyncio.Event()

    async def answer(message: Start | Stop | Report, writer: asyncio.StreamWriter) -> None:
        reply = Reply(request=message.request, worker=1)
        if isinstance(message, Start):
            writer.write(encode(replace(reply, targets=(begun,))) + encode(Changed(target=failed)))
        else:
            writer.write(encode(reply))
        if isinstance(message, Stop):
            stopped.set()

    async with played(tmp_path / "capturer.sock", answer) as client, asyncio.timeout(PATIENCE):
        client.capturer.want({target.id: target})
        await stopped.wait()


@pytest.mark.parametrize(
    ("earlier", "pause"),
    [
        (None, 0.5),
        ((2.0, None), 4.0),
        ((2.0, 98.0), 4.0),
        ((2.0, 97.9), 0.5),
        ((30.0, None), 30.0),
    ],
)
def test_a_pause_is_forgotten_after_a_run_that_was_well_for_longer(
    earlier: tuple[float, float | None] | None, pause: float
) -> None:
    target = Target(capture_uid=UID, pod_uid=UID, pod_name="web-0", pod_addresses=("10.0.0.1",))
    status = TargetStatus(target=target, started=1, state=State.FAILED)
    failure = _Failure(status, earlier[0], 0.0, well_since=earlier[1]) if earlier else None
    assert _pause_after(failure, 100.0) == pause


async def test_many_targets_are_started_and_stopped(client: Client, pod: Pod) -> None:
    targets = {target.id: target for target in (pod.target(ring_bytes=1 << 19) for _ in range(40))}
    client.capturer.want(targets)
    await eventually(lambda: all(client.state(target_id) is State.CAPTURING for target_id in targets))
    client.capturer.want({})
    await eventually(lambda: not client.capturer.running())
    assert {status.target.id for status in client.ended} == targets.keys()


async def test_without_a_capturer_requests_fail_and_connecting_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "capturer.sock"
    client = Client(path)
    task = asyncio.create_task(client.capturer.run())
    with pytest.raises(CapturerError):
        await client.capturer.refresh()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        channel, _ = await asyncio.get_running_loop().sock_accept(listener)
        with channel:
            asked = await asyncio.get_running_loop().sock_recv(channel, 1000)
    assert b'"Report"' in asked
    assert not client.capturer.is_known
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
