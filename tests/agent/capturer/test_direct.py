"""Files written past the page cache are the same files, and can be read while they grow."""

import contextlib
import functools
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from agent.capturer.dump import Buffer, open_direct
from agent.capturer.protocol import State, Target
from tests.agent.world import HEADERS, PORT, Capturer, Pod, run


def payloads(path: Path) -> list[int]:
    with RawPcapReader(str(path)) as reader:
        return [int.from_bytes(packet[HEADERS : HEADERS + 8], "big") for packet, _ in reader]


def writes_directly(capturer: Capturer, target: Target) -> bool:
    """Whether the worker has the target's newest file open with O_DIRECT."""
    newest = capturer.files(target)[-1]
    process = Path(f"/proc/{capturer.worker_pid()}")
    numbers = [entry.name for entry in (process / "fd").iterdir() if os.readlink(entry) == str(newest)]
    texts = [(process / "fdinfo" / number).read_text() for number in numbers]
    flags = [int(text.split("flags:")[1].split()[0], 8) for text in texts]
    return any(flag & os.O_DIRECT for flag in flags)


@pytest.fixture(params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if request.param == "ext4":
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, 24 << 20)
        run("mkfs.ext4", "-q", str(image))
        run("mount", "-o", "loop", str(image), str(directory))
    else:
        run("mount", "-t", "tmpfs", "-o", "size=16m", "kpc-test", str(directory))
    yield directory
    run("umount", str(directory))


def test_every_packet_is_in_the_file_after_each_flush_and_the_stop(pod: Pod, disk: Path) -> None:
    capturer = Capturer(disk)
    target = pod.target(direct=True, ring_bytes=64 << 20)
    capturer.start(target)
    assert writes_directly(capturer, target)
    (file,) = capturer.files(target)
    sent = 0
    for count in (1, 3, 700, 1200, 5, 900, 2):  # less and more than the buffer of 1 MiB
        pod.in_peer(functools.partial(send_numbered, pod.address, range(sent, sent + count)))
        sent += count
        (status,) = capturer.report(flush=True)
        (recorded,) = status.interfaces[0].files
        assert recorded.packets == sent
        assert file.stat().st_size == recorded.size
        assert payloads(file) == list(range(sent))
    status = capturer.stop(target)
    assert payloads(file) == list(range(sent))
    assert file.stat().st_size == status.interfaces[0].files[0].size
    capturer.close()


def send_numbered(address: str, numbers: range) -> None:

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        for number in numbers:
            channel.sendto(number.to_bytes(8, "big").ljust(1400, b"."), (address, PORT))


def test_rotation_loses_nothing(pod: Pod, disk: Path) -> None:
    capturer = Capturer(disk)
    target = pod.target(direct=True, max_file_bytes=2_500_000, max_files=100, ring_bytes=64 << 20)
    capturer.start(target)
    pod.receive(6000, size=1400)
    capturer.stop(target)
    files = capturer.files(target)
    assert len(files) == 4
    assert max(file.stat().st_size for file in files) <= 2_500_000
    assert [number for file in files for number in payloads(file)] == list(range(6000))
    capturer.close()


def test_a_full_disk_stops_the_capture_and_every_packet_is_accounted_for(pod: Pod, disk: Path) -> None:
    capturer = Capturer(disk)
    target = pod.target(direct=True, max_file_bytes=100_000_000, ring_bytes=64 << 20)
    capturer.start(target)
    os.kill(capturer.worker_pid(), signal.SIGSTOP)  # so that all of it has come when the disk fills
    pod.receive(20_000, size=1400)
    os.kill(capturer.worker_pid(), signal.SIGCONT)
    assert capturer.next_state(State.FAILED).reason == "WriteFailed"
    (status,) = capturer.report()
    (interface,) = status.interfaces
    (file,) = capturer.files(target)
    assert "No space left on device" in status.message
    assert file.stat().st_size == interface.files[0].size
    assert payloads(file) == list(range(interface.packets))
    assert interface.packets + interface.dropped == 20_000
    capturer.close()


def test_a_disk_that_others_filled_stops_the_capture_at_the_next_flush(pod: Pod, disk: Path) -> None:
    capturer = Capturer(disk)
    target = pod.target(direct=True, ring_bytes=64 << 20)
    capturer.start(target)
    with contextlib.suppress(OSError), open(disk / "others", "wb", buffering=0) as others:
        while others.write(bytes(1 << 16)):
            pass
    with contextlib.suppress(OSError), open(disk / "others", "ab", buffering=0) as others:
        while others.write(bytes(1 << 9)):
            pass
    pod.receive(100, size=1400)
    assert capturer.next_state(State.FAILED).reason == "WriteFailed"
    ((interface,),) = (status.interfaces for status in capturer.report())
    (file,) = capturer.files(target)
    assert payloads(file) == list(range(interface.packets))
    assert interface.packets + interface.dropped == 100
    capturer.close()


def test_a_file_system_without_it_is_written_as_usual(pod: Pod, tmp_path: Path) -> None:
    run("mount", "-t", "ramfs", "kpc-test", str(tmp_path))
    try:
        capturer = Capturer(tmp_path)
        target = pod.target(direct=True, max_file_bytes=1_000_000, max_files=10, ring_bytes=64 << 20)
        assert capturer.start(target).state is State.CAPTURING
        assert not writes_directly(capturer, target)
        pod.receive(1000, size=1400)
        capturer.stop(target)
        assert [number for file in capturer.files(target) for number in payloads(file)] == list(range(1000))
        capturer.close()
    finally:
        run("umount", str(tmp_path))


def test_finding_out_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    direct = open_direct(descriptor, Buffer(1 << 20))
    assert direct is not None
    os.close(direct)
    assert (os.fstat(descriptor).st_size, os.lseek(descriptor, 0, os.SEEK_CUR)) == (0, 0)
    os.close(descriptor)
