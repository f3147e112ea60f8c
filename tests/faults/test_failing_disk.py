"""A disk that fails stops the captures on it, with the reason, and no other; nothing that was written is lost."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.capturer.protocol import State, Target, TargetStatus
from tests.agent.world import Capturer, Pod, eventually, make_pod
from tests.faults import filesystems
from tests.faults.filesystems import MEGABYTE, Disk

HEALTHY = {"max_file_bytes": 100 * MEGABYTE}
DATAGRAM = 1400


@pytest.fixture
def pod() -> Iterator[Pod]:
    with make_pod(address="10.203.0.2", peer_address="10.203.0.1") as pod:
        yield pod


@pytest.fixture
def capturer(tmp_path: Path) -> Iterator[Capturer]:
    capturer = Capturer(tmp_path)
    yield capturer
    capturer.close()


@pytest.fixture
def failing(pod: Pod, capturer: Capturer) -> Target:
    """The capture whose directory lies on the disk that will fail."""
    return pod.target(**HEALTHY, direct=True)


@pytest.fixture
def healthy(pod: Pod) -> Target:
    return pod.target(**HEALTHY)


@pytest.fixture
def disk(failing: Target, capturer: Capturer, tmp_path: Path) -> Iterator[Disk]:
    with filesystems.ext4(capturer.captures / failing.capture_uid, tmp_path / "image") as disk:
        yield disk


def test_a_disk_that_others_fill_fails_its_captures_alone(
    pod: Pod, capturer: Capturer, failing: Target, healthy: Target, disk: Disk
) -> None:
    capturer.start(failing)
    capturer.start(healthy)
    pod.receive(3000, size=DATAGRAM)
    assert flushed(capturer, failing).interfaces[0].packets == 3000
    hog = disk.fill()
    status = fail(pod, capturer, failing)
    assert (status.state, status.reason) == (State.FAILED, "WriteFailed")
    assert "No space left on device" in status.message
    assert packets_in(disk.directory) == status.interfaces[0].packets >= 3000
    assert state(capturer, healthy) is State.CAPTURING
    assert_accounted(pod, capturer, healthy)

    hog.unlink()
    assert_the_next_run_captures(pod, capturer, failing)


def test_a_disk_that_turns_read_only_refuses_the_next_file(
    pod: Pod, capturer: Capturer, failing: Target, disk: Disk
) -> None:
    disk.remount("ro")
    status = capturer.start(failing)
    assert (status.state, status.reason) == (State.FAILED, "WriteFailed")
    assert "Read-only file system" in status.message
    disk.remount("rw")
    assert_the_next_run_captures(pod, capturer, failing)


def flushed(capturer: Capturer, target: Target) -> TargetStatus:
    return next(status for status in capturer.report(flush=True) if status.target.id == target.id)


def state(capturer: Capturer, target: Target) -> State:
    return next(status.state for status in capturer.report() if status.target.id == target.id)


def fail(pod: Pod, capturer: Capturer, target: Target) -> TargetStatus:
    """Send until the capture has failed."""

    def failed() -> TargetStatus | None:
        pod.receive(2000, size=DATAGRAM)
        status = flushed(capturer, target)
        return status if status.state is State.FAILED else None

    return eventually(failed)  # type: ignore[return-value]


def assert_accounted(pod: Pod, capturer: Capturer, target: Target) -> None:
    """What is in the files is what the status says."""
    (interface,) = flushed(capturer, target).interfaces
    assert packets_in(capturer.captures / target.capture_uid) == interface.packets
    assert interface.dropped == 0


def assert_the_next_run_captures(pod: Pod, capturer: Capturer, target: Target) -> None:
    capturer.stop(target)
    assert capturer.start(target).state is State.CAPTURING
    pod.receive(100)
    assert capturer.stop(target).interfaces[0].packets == 100


def packets_in(directory: Path) -> int:
    """The packets of all files, every one of which tcpdump must read to its end."""
    total = 0
    for file in directory.glob("*.pcap"):
        read = subprocess.run(["tcpdump", "-nqr", file], capture_output=True, text=True, check=True)
        assert "truncated" not in read.stderr
        total += len(read.stdout.splitlines())
    return total
