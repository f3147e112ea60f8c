"""Files are filled to the last packet that fits, and not a byte further, whatever the sizes of packets and buffers."""

import errno
import itertools
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.capturer.dump import Buffer, Dump, Rest, WriteError

HEADER = b"h" * 24
BUFFER = Buffer(4096)


class Stream:
    """What writes a file's header, in place of libpcap."""

    def dump_to(self, stream: int) -> int:
        return stream


def record(number: int, size: int) -> bytes:
    return struct.pack("=IIII", number, 0, size, size) + number.to_bytes(4, "big") * (size // 4) + b"." * (size % 4)


def begin(path: Path, *, limit: int) -> Dump:
    handle: Any = Stream()
    dump = Dump(handle, os.open(path, os.O_RDWR | os.O_CREAT), BUFFER, limit=limit)
    dump.append(Rest(HEADER, 0))
    return dump


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=60),
    batches=st.lists(st.integers(1, 12), min_size=60, max_size=60),
    limit=st.integers(24 + 16 + 3000, 20_000),
    flushes=st.lists(st.booleans(), min_size=60, max_size=60),
)
@settings(deadline=None)
def test_every_record_is_in_one_file_and_none_is_larger_than_its_limit(
    sizes: list[int], batches: list[int], limit: int, flushes: list[bool]
) -> None:
    records = [record(number, size) for number, size in enumerate(sizes)]
    waiting = iter(records)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / "0"]
        dump = begin(paths[0], limit=limit)
        for count, flush in zip(batches, flushes, strict=True):
            start = dump.tell()
            batch = list(itertools.islice(waiting, count))
            for each in batch:
                dump.append(Rest(each, 1))
            packets = len(batch)
            while dump.tell() > limit:
                assert paths[-1].stat().st_size <= limit, "nothing beyond the limit even for a moment"
                rest = dump.split(start)
                assert rest.packets <= packets
                dump.flush()
                dump.close()
                assert limit - paths[-1].stat().st_size < len(first_of(rest.data)), "the next packet had room"
                paths.append(Path(name) / str(len(paths)))
                dump = begin(paths[-1], limit=limit)
                start, packets = dump.tell(), rest.packets
                dump.append(rest)
            if flush:
                dump.flush()
                assert paths[-1].stat().st_size == dump.tell()
        dump.flush()
        dump.close()
        contents = [path.read_bytes() for path in paths]
    assert all(len(content) <= limit for content in contents)
    assert b"".join(content.removeprefix(HEADER) for content in contents) == b"".join(records)


def first_of(data: bytes) -> bytes:
    (size,) = struct.unpack_from("=8xI", data)
    return data[: 16 + size]


def test_a_file_that_is_cut_ends_there_and_can_be_gone_on_with(tmp_path: Path) -> None:
    dump = begin(tmp_path / "file", limit=100_000)
    dump.append(Rest(record(1, 100), 1))
    dump.flush()
    size = dump.tell()
    dump.append(Rest(record(2, 9000), 1))
    dump.cut(size)
    dump.close()
    assert (tmp_path / "file").read_bytes() == HEADER + record(1, 100)


def test_a_write_that_the_kernel_answers_with_an_error_is_told_and_nothing_after_it_is_tried() -> None:
    """A real EIO, of the only file that gives it without harm to the kernel: memory that is not mapped."""
    handle: Any = Stream()
    dump = Dump(handle, os.open("/proc/self/mem", os.O_RDWR), BUFFER, limit=1 << 30)
    dump.append(Rest(HEADER, 0))
    with pytest.raises(WriteError) as error:
        dump.flush()
    assert error.value.errno == errno.EIO
    with pytest.raises(WriteError, match="Input/output error"):
        dump.append(Rest(b"." * 2 * BUFFER.size, 1))
    with pytest.raises(WriteError, match="Input/output error"):
        dump.check()
    dump.close()
