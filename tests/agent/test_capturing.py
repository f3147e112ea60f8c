"""The agent's side of the capturer, with a real capturer on the other."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from agent.capturer.protocol import State, TargetStatus
from agent.capturing import Capturer, CapturerError
from tests.agent import world
from tests.agent.world import Pod

PATIENCE = 20


class Client:
    """The real client, with what it was told."""

    def __init__(self, path: Path) -> None:
        self.ended: list[TargetStatus] = []
        self.told: list[TargetStatus] = []
        self.capturer = Capturer(path, on_status=self.told.append, on_end=self.ended.append)

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
    assert client.ended == [before]
    assert after.started != before.started


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
