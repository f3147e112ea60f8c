"""A disk of 64 MB, filled by others and by us: no write fails, the oldest files go, captures pause and go on."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.world import World, eventually
from tests.faults import filesystems
from tests.faults.filesystems import MEGABYTE

FLOOR = 16 * MEGABYTE
DATAGRAM = 1400


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the agent of this module's tests keeps its files."""
    with filesystems.tmpfs(tmp_path_factory.mktemp("small"), size=64 * MEGABYTE) as directory:
        yield directory


@pytest.fixture
async def node(cluster: World) -> World:
    await cluster.stop_agent()
    cluster.environment["MIN_FREE_BYTES"] = str(FLOOR)
    await cluster.start_agent()
    return cluster


async def test_others_fill_the_disk_and_make_room_again(node: World, tmp_path: Path) -> None:
    uid = await node.create_capture("c")
    await node.create_pod(labels={"app": "web"})
    await node.waits(uid)
    await node.send(100)
    await node.reported_as(uid, "Capturing", packets=100)
    hog = filesystems.fill(tmp_path)
    pressed = await node.reported_as(uid, "Error", "DiskPressure", packets=100)
    assert "must be" in pressed.message
    assert pressed.pods == 0

    async def evicted() -> bool:
        found = await node.reported(uid)
        return found is not None and found.evicted == 1

    await eventually(evicted)  # the only file goes too, as it is the oldest, once it is finished
    hog.unlink()
    again = await node.reported_as(uid, "Capturing", packets=100)
    assert (again.evicted, again.interruptions) == (1, 1)
    await node.send(50)
    await node.reported_as(uid, "Capturing", packets=150)


async def test_a_capture_that_may_keep_more_than_there_is_room_for_loses_its_oldest_files_and_nothing_else(
    node: World, tmp_path: Path
) -> None:
    rotation = {"maxFileSize": 2 * MEGABYTE, "maxFiles": 100}
    uid = await node.create_capture("c", rotation=rotation)
    await node.create_pod(labels={"app": "web"})
    await node.waits(uid)

    async def roomy() -> bool:
        return free(tmp_path) > FLOOR // 2

    for _ in range(60):
        await eventually(roomy)
        await asyncio.to_thread(node.pod.receive, 1000, size=DATAGRAM)

    async def settled() -> bool:
        found = await node.reported(uid)
        return found is not None and found.packets + found.dropped == 60_000

    await eventually(settled)
    found = await node.reported_as(uid, "Capturing")
    assert found.evicted > 0
    assert found.interruptions == 0, "it never had to pause"
    files = sorted((node.capturer.captures / uid).glob("*.pcap"))
    assert len(files) == found.files
    assert await asyncio.to_thread(all_whole, files)


def all_whole(files: list[Path]) -> bool:
    """Whether tcpdump reads each to its end."""
    read = [subprocess.run(["tcpdump", "-nqr", file], capture_output=True, text=True, check=True) for file in files]
    return not any("truncated" in each.stderr for each in read)


def free(directory: Path) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize
