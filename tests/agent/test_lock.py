"""One agent at a time, by the kernel's word."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from agent.lock import LOCK_NAME, NodeLock
from tests.agent.test_capturing import eventually


async def test_a_second_agent_waits_until_the_first_lets_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = NodeLock(tmp_path), NodeLock(tmp_path)
    entered = asyncio.Event()

    async def wait() -> None:
        async with second.held():
            entered.set()

    async with first.held():
        assert first.waits_for is None
        waiting = asyncio.create_task(wait())
        await eventually(lambda: second.waits_for == "another agent is at work on this node")
        await asyncio.sleep(0.6)  # some more tries
        assert not entered.is_set()
        assert len([line for line in caplog.messages if "another agent" in line]) == 1
    await waiting
    assert second.waits_for is None


async def test_the_lock_of_an_agent_that_was_killed_is_free(tmp_path: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"{code} time.sleep(60)", str(tmp_path / LOCK_NAME), stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    await holder.stdout.readline()
    lock = NodeLock(tmp_path)

    async def take() -> None:
        async with lock.held():
            pass

    taking = asyncio.create_task(take())
    await eventually(lambda: lock.waits_for == "another agent is at work on this node")
    holder.kill()
    await holder.wait()
    await taking


async def test_until_the_capturer_made_the_directory_an_agent_waits(tmp_path: Path) -> None:
    lock = NodeLock(tmp_path / "captures")

    async def take() -> None:
        async with lock.held():
            pass

    taking = asyncio.create_task(take())
    await eventually(lambda: "can't be taken" in (lock.waits_for or ""))
    (tmp_path / "captures").mkdir()
    await taking
