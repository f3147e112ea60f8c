"""Files and their records, with files as libpcap writes them."""

import asyncio
import errno
import hashlib
import json
import os
import struct
import uuid
from collections.abc import Collection
from pathlib import Path

import pytest

from agent.capturer.protocol import FileStatus, InterfaceStatus, State, Target, TargetStatus
from agent.pcapfile import Walk, first_time, walk, whole_size
from agent.store import FileRecord, Store
from api.names import file_name

NOW = 1_790_000_000_000_000_000
CAPTURE = str(uuid.uuid4())
POD = str(uuid.uuid4())
TARGET = Target(
    capture_uid=CAPTURE, pod_uid=POD, pod_name="web-0", pod_addresses=("10.0.0.1",), filter="tcp", snap_length=100
)


def pcap(packets: int, *, size: int = 60) -> bytes:
    """So many packets, a second apart."""
    content = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
    for number in range(packets):
        content += struct.pack("=IIII", NOW // 10**9 + number, 7, size, size) + bytes(size)
    return content


def name(sequence: int = 0, *, interface: str = "eth0") -> str:
    return file_name(pod="web-0", interface=interface, created_ns=NOW + sequence, pod_uid=POD, sequence=sequence)


def status(*files: FileStatus, state: State = State.CAPTURING) -> TargetStatus:
    interface = InterfaceStatus(interface="eth0", state=state, files=files)
    return TargetStatus(target=TARGET, started=1, state=state, interfaces=(interface,))


def file(sequence: int, *, packets: int, open_: bool, size: int | None = None, dropped: int = 0) -> FileStatus:
    return FileStatus(
        name=name(sequence),
        interface="eth0",
        created=NOW + sequence,
        size=len(pcap(packets)) if size is None else size,
        packets=packets,
        dropped=dropped,
        last_batch_offset=24 + 76 * max(0, packets - 2),
        closed=None if open_ else NOW + 1000,
    )


class Fixture:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.errors = 0
        self.engaged: Collection[str] | None = []
        self.store = self.restarted()
        self.recorded: list[FileRecord] = []

    def restarted(self) -> Store:
        return Store(self.directory, node="node-1", engaged=lambda: self.engaged, on_error=self._count_error)

    def _count_error(self) -> None:
        self.errors += 1

    def write(self, content: bytes, *, sequence: int = 0, capture: str = CAPTURE) -> Path:
        path = self.directory / capture / name(sequence)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    async def finish(self) -> None:
        await self.store.finish(on_record=lambda _, record: self.recorded.append(record))


@pytest.fixture
def fixture(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path / "captures")


async def test_a_file_that_is_being_written_is_listed_as_the_capturer_tells(fixture: Fixture) -> None:
    fixture.write(pcap(5) + b"torn")
    fixture.store.observe(status(file(0, packets=5, open_=True, dropped=2)))
    (listed,) = await fixture.store.files(CAPTURE)
    assert (listed.node, listed.pod, listed.interface, listed.name) == ("node-1", "web-0", "eth0", name())
    assert (listed.size, listed.packets, listed.dropped, listed.received) == (len(pcap(5)), 5, 2, 7)
    assert (listed.state, listed.sha256) == ("Writing", None)
    assert listed.first_packet_time == "2026-09-21T14:13:20.000000007Z"
    assert listed.last_packet_time == "2026-09-21T14:13:24.000000007Z"


async def test_a_closed_file_gets_a_record_that_outlives_the_agent(fixture: Fixture) -> None:
    fixture.write(pcap(5))
    fixture.store.observe(status(file(0, packets=5, open_=False, dropped=2)))
    await fixture.finish()
    assert [record.recovered for record in fixture.recorded] == [False]
    (listed,) = await fixture.store.files(CAPTURE)
    assert (listed.state, listed.sha256) == ("Finished", hashlib.sha256(pcap(5)).hexdigest())
    fixture.store = fixture.restarted()
    assert await fixture.store.files(CAPTURE) == [listed]
    record = json.loads((fixture.directory / CAPTURE / f"{name()}.json").read_text())
    assert (record["podUid"], record["filter"], record["snapLength"]) == (POD, "tcp", 100)
    assert (record["recovered"], record["tornBytes"], record["run"]) == (False, 0, 1)
    assert record["opened"] == "2026-09-21T14:13:20.000000000Z"
    assert record["closed"] == "2026-09-21T14:13:20.000001000Z"


async def test_a_file_whose_writer_died_is_recovered_up_to_its_last_whole_packet(fixture: Fixture) -> None:
    path = fixture.write(pcap(5)[:-1])
    await fixture.finish()
    (listed,) = await fixture.store.files(CAPTURE)
    assert (listed.size, listed.packets, listed.pod, listed.interface) == (len(pcap(4)), 4, "web-0", "eth0")
    assert listed.sha256 == hashlib.sha256(pcap(4)).hexdigest()
    assert path.read_bytes() == pcap(4), "the torn packet is cut off"
    (record,) = fixture.recorded
    assert (record.recovered, record.packets, record.torn_bytes, record.run) == (True, 4, 75, NOW)


async def test_the_record_of_a_file_of_which_nothing_was_told_is_read_again(fixture: Fixture) -> None:
    fixture.write(pcap(5))
    await fixture.finish()
    fixture.store = fixture.restarted()
    await fixture.finish()
    assert len(fixture.recorded) == 1, "it is not made anew"
    assert [record for _, record in await fixture.store.records()] == fixture.recorded


async def test_a_torn_end_that_can_not_be_cut_off_is_never_served(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fixture.write(pcap(5)[:-1])

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "ftruncate", refuse)
    await fixture.finish()
    assert path.read_bytes() == pcap(5)[:-1]
    opened = await fixture.store.open(CAPTURE, path.name)
    os.close(opened.descriptor)
    assert (opened.size, opened.finished) == (len(pcap(4)), True)
    assert [record.torn_bytes for record in fixture.recorded] == [75]


async def test_recovery_counts_what_was_not_told_before(fixture: Fixture) -> None:
    fixture.write(pcap(5))
    fixture.store.observe(status(file(0, packets=3, open_=True, dropped=1)))
    await fixture.finish()
    (listed,) = await fixture.store.files(CAPTURE)
    assert (listed.packets, listed.dropped) == (5, 1)
    assert (listed.first_packet_time, listed.last_packet_time) == (
        "2026-09-21T14:13:20.000000007Z",
        "2026-09-21T14:13:24.000000007Z",
    )
    assert [record.packets for record in fixture.recorded] == [5]


async def test_packets_that_were_told_and_went_with_the_page_cache_are_dropped(fixture: Fixture) -> None:
    fixture.write(pcap(2))
    fixture.store.observe(status(file(0, packets=5, open_=True, dropped=1)))
    await fixture.finish()
    (listed,) = await fixture.store.files(CAPTURE)
    assert (listed.packets, listed.dropped) == (2, 4)


async def test_a_file_that_may_be_written_to_is_left_alone(fixture: Fixture) -> None:
    fixture.write(pcap(5))
    for engaged in (None, [TARGET.id]):
        fixture.engaged = engaged
        await fixture.finish()
    assert await fixture.store.files(CAPTURE) == []
    assert fixture.recorded == []


async def test_a_file_of_before_the_workers_death_is_recovered_while_its_pod_is_captured_again(
    fixture: Fixture,
) -> None:
    fixture.write(pcap(5), sequence=0)
    fixture.write(pcap(1), sequence=1)
    fixture.engaged = [TARGET.id]
    fixture.store.observe(status(file(1, packets=1, open_=True)))
    await fixture.finish()
    listed = await fixture.store.files(CAPTURE)
    assert [(each.state, each.packets) for each in listed] == [("Finished", 5), ("Writing", 1)]


async def test_a_file_without_a_whole_header_is_removed(fixture: Fixture) -> None:
    path = fixture.write(pcap(0)[:10])
    await fixture.finish()
    assert not path.exists()
    assert await fixture.store.files(CAPTURE) == []


async def test_a_record_that_can_not_be_read_is_made_anew(fixture: Fixture) -> None:
    path = fixture.write(pcap(5))
    path.with_name(f"{path.name}.json").write_text("{")
    await fixture.finish()
    assert [each.packets for each in await fixture.store.files(CAPTURE)] == [5]


async def test_files_of_captures_that_are_gone_are_removed(fixture: Fixture) -> None:
    other, busy = str(uuid.uuid4()), str(uuid.uuid4())
    for capture in (CAPTURE, other, busy):
        fixture.write(pcap(1), capture=capture)
    (fixture.directory / "not-a-uid").mkdir()
    gone = await fixture.store.retain([CAPTURE], writing=lambda: [f"{busy}/{POD}"])
    assert gone == [other]
    assert {path.name for path in fixture.directory.iterdir()} == {CAPTURE, busy, "not-a-uid"}


async def test_usage_lists_files_oldest_first_and_forgets_rotated_ones(fixture: Fixture) -> None:
    paths = [fixture.write(pcap(packets), sequence=packets) for packets in (1, 2, 3)]
    await fixture.finish()
    paths[0].unlink()
    used = await fixture.store.usage()
    assert [(each.name, each.size, each.finished) for each in used] == [
        (name(2), len(pcap(2)), True),
        (name(3), len(pcap(3)), True),
    ]
    assert not paths[0].with_name(f"{paths[0].name}.json").exists()
    await fixture.store.remove(CAPTURE, name(2))
    assert [each.name for each in await fixture.store.files(CAPTURE)] == [name(3)]


async def test_a_file_that_the_capturer_closed_can_go_before_it_has_a_record(fixture: Fixture) -> None:
    """On a full disk no record can be written."""
    path = fixture.write(pcap(5))
    fixture.store.observe(status(file(0, packets=5, open_=False)))
    assert [each.finished for each in await fixture.store.usage()] == [True]
    await fixture.store.remove(CAPTURE, name())
    assert not path.exists()
    await fixture.finish()
    assert fixture.recorded == []


async def test_what_the_kernel_could_not_write_is_told_in_the_record(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.write(pcap(5))
    fixture.store.observe(status(file(0, packets=5, open_=False)))

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    await fixture.finish()
    assert [record.write_error for record in fixture.recorded] == ["[Errno 5] input/output error"]
    assert [record.write_error for _, record in await fixture.restarted().records()] == ["[Errno 5] input/output error"]


async def test_of_files_without_a_packet_only_the_latest_stays(fixture: Fixture) -> None:
    for sequence, packets in enumerate((0, 3, 0, 0)):
        fixture.write(pcap(packets), sequence=sequence)
    await fixture.finish()
    left = sorted(path.name for path in (fixture.directory / CAPTURE).iterdir())
    assert left == sorted(each for kept in (1, 3) for each in (name(kept), f"{name(kept)}.json"))


async def test_a_file_takes_whole_blocks_and_so_does_its_record(fixture: Fixture) -> None:
    path = fixture.write(pcap(0))
    await fixture.finish()
    (used,) = await fixture.store.usage()
    blocks = sum(each.stat().st_blocks for each in path.parent.iterdir())
    assert (used.size, used.space) == (24, 512 * blocks)
    assert len(list(path.parent.iterdir())) == 2


async def test_a_file_that_goes_while_it_is_hashed_is_not_told_of(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removed it has counted it already."""
    path = fixture.write(pcap(5))
    fixture.store.observe(status(file(0, packets=5, open_=False)))
    pread = os.pread

    def pread_and_remove(descriptor: int, size: int, offset: int) -> bytes:
        path.unlink(missing_ok=True)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread_and_remove)
    await fixture.finish()
    assert fixture.recorded == []
    assert list(path.parent.iterdir()) == []
    assert await fixture.store.records() == []


async def test_a_file_is_recorded_once_whoever_asks(fixture: Fixture) -> None:
    fixture.write(pcap(5))
    await asyncio.gather(fixture.finish(), fixture.finish())
    assert len(fixture.recorded) == 1


async def test_counters_lie_beside_the_files_and_go_with_them(fixture: Fixture) -> None:
    path = fixture.write(pcap(1))
    await fixture.store.keep_counters({CAPTURE: b"1", str(uuid.uuid4()): b"2"})
    assert await fixture.store.counters() == {CAPTURE: b"1"}
    assert [each.name for each in await fixture.store.usage()] == [path.name]
    await fixture.finish()
    assert [each.name for each in await fixture.store.files(CAPTURE)] == [path.name]
    assert await fixture.store.retain([], writing=list) == [CAPTURE]
    assert await fixture.store.counters() == {}


async def test_counters_that_could_not_be_written_are_named(fixture: Fixture) -> None:
    other = str(uuid.uuid4())
    for capture in (CAPTURE, other):
        fixture.write(pcap(1), capture=capture)
    (fixture.directory / CAPTURE / "counters.json").mkdir()
    assert await fixture.store.keep_counters({CAPTURE: b"1", other: b"2"}) == [CAPTURE]
    assert (fixture.directory / other / "counters.json").read_bytes() == b"2"
    assert len(list((fixture.directory / CAPTURE).iterdir())) == 2, "nothing half written stays"


async def test_writers_of_one_file_do_not_meet(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that nobody waits for any more goes on beside the next one."""
    path = fixture.write(pcap(1)).with_name("counters.json")
    inner = [b"2" * 10]
    synced: list[bytes] = []

    def fsync(descriptor: int) -> None:
        if inner:
            assert asyncio.run(fixture.store.keep_counters({CAPTURE: inner.pop()})) == []  # this is a thread
        synced.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    assert await fixture.store.keep_counters({CAPTURE: b"1"}) == []
    assert synced == [b"2" * 10, b"1"], "all of it is on the disk before it takes its name"
    assert path.read_bytes() == b"1"


async def test_what_a_dead_agent_had_half_written_goes(fixture: Fixture) -> None:
    path = fixture.write(pcap(1))
    path.with_name(".counters.json.0123abcd.new").write_bytes(b"{")
    await fixture.store.counters()
    assert list(path.parent.iterdir()) == [path]


async def test_one_broken_directory_or_file_hides_no_other(fixture: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    broken, odd = str(uuid.uuid4()), str(uuid.uuid4())
    path = fixture.write(pcap(5))
    fixture.write(pcap(5), capture=odd).with_name("counters.json").mkdir()
    (fixture.directory / broken).write_bytes(b"not a directory")
    await fixture.store.keep_counters({CAPTURE: b"1"})
    assert await fixture.store.counters() == {CAPTURE: b"1"}
    await fixture.finish()
    assert [record.packets for record in fixture.recorded] == [5, 5]
    for _ in range(2):
        assert {each.capture_uid for each in await fixture.store.usage()} == {CAPTURE, odd}
    assert len(await fixture.store.records()) == 2
    assert path.exists()
    assert len([line for line in caplog.messages if line.startswith(f"usage of capture {broken}")]) == 1
    assert fixture.errors >= 5


async def test_a_file_that_can_not_be_removed_has_to_stay(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.write(pcap(5))
    await fixture.finish()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(OSError, match="read-only"):
            await fixture.store.remove(CAPTURE, name())
    assert [each.finished for each in await fixture.store.usage()] == [False], "room must be made otherwise"


async def test_a_record_is_read_of_a_capture_that_goes_meanwhile(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.write(pcap(5))
    await fixture.finish()
    fixture.store = fixture.restarted()
    loop = asyncio.get_running_loop()
    validate = FileRecord.model_validate_json

    def validate_late(text: bytes) -> FileRecord:
        gone = asyncio.run_coroutine_threadsafe(fixture.store.retain([], writing=list), loop)
        assert gone.result() == [CAPTURE]
        return validate(text)

    monkeypatch.setattr(FileRecord, "model_validate_json", validate_late)
    assert [record.packets for _, record in await fixture.store.records()] == [5]


async def test_what_is_not_ours_is_left_and_named_once(fixture: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    (fixture.directory / "theirs").mkdir(parents=True)
    for _ in range(2):
        assert await fixture.store.retain([], writing=list) == []
    assert (fixture.directory / "theirs").exists()
    assert [line for line in caplog.messages if "theirs" in line] == [
        f"{fixture.directory / 'theirs'} is not of ours and is left alone"
    ]


async def test_without_a_directory_there_are_no_files(fixture: Fixture) -> None:
    assert await fixture.store.files(CAPTURE) == []
    assert await fixture.store.usage() == []
    assert await fixture.store.retain([], writing=list) == []


async def test_links_are_not_followed(fixture: Fixture, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(pcap(1))
    path = fixture.write(b"")
    path.unlink()
    path.symlink_to(secret)
    await fixture.finish()
    assert await fixture.store.files(CAPTURE) == []
    with pytest.raises(OSError, match="symbolic links"):
        await fixture.store.open(CAPTURE, path.name)


class TestPcapFile:
    @pytest.mark.parametrize("cut", range(24 + 2 * 76 + 1))
    def test_a_file_cut_at_any_byte_ends_at_its_last_whole_packet(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(pcap(2)[:cut])
        with path.open("rb") as opened:
            found = whole_size(opened.fileno())
        packets = max(0, (cut - 24) // 76)
        assert (found.packets, found.end) == (packets, 24 + 76 * packets if cut >= 24 else 0)

    def test_what_is_no_record_ends_the_walk(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(pcap(2) + b"\xff" * 100)
        with path.open("rb") as opened:
            assert whole_size(opened.fileno()).packets == 2
            assert walk(opened.fileno(), start=24 + 76, end=24 + 152) == Walk(
                1, 24 + 152, NOW + 10**9 + 7, NOW + 10**9 + 7
            )
            assert first_time(opened.fileno(), 24) is None
