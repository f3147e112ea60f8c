"""Reading the record headers of our own capture files: when packets were seen, and where a file torn by a crash ends.

Headers only, one small read each: never on the capture's path, at most 4096 of them for a file that was closed well.
The format is pcap with nanoseconds as libpcap writes it on this machine (draft-ietf-opsawg-pcap).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.capturer.libpcap import FILE_HEADER_BYTES, RECORD_HEADER_BYTES

_MAGIC: Final = struct.pack("=I", 0xA1B23C4D)
_RECORD: Final = struct.Struct("=IIII")
_NANOSECONDS: Final = 1_000_000_000
_LONGEST_RECORD: Final = 262144


@dataclass(frozen=True, slots=True)
class Walk:
    """What the records of a part of a file say. `end` is where the last whole one ends; times are ns since 1970."""

    packets: int
    end: int
    first: int | None
    last: int | None


def walk(descriptor: int, *, start: int = FILE_HEADER_BYTES, end: int) -> Walk:
    """Follow the records from `start`, a record's boundary, up to `end` or to the first that is not whole."""
    packets, first, last, position = 0, None, None, start
    for moment, after in _records(descriptor, start, end):
        packets += 1
        first = moment if first is None else first
        last, position = moment, after
    return Walk(packets, position, first, last)


def whole_size(descriptor: int) -> Walk:
    """Walk the whole file, whose writer may have died at any byte. `end` is 0 when its own header is not whole."""
    size = os.fstat(descriptor).st_size
    if os.pread(descriptor, FILE_HEADER_BYTES, 0)[: len(_MAGIC)] != _MAGIC or size < FILE_HEADER_BYTES:
        return Walk(0, 0, None, None)
    return walk(descriptor, end=size)


def first_time(descriptor: int, size: int) -> int | None:
    """When the first packet was seen, in ns since 1970; None when there is none."""
    for moment, _ in _records(descriptor, FILE_HEADER_BYTES, size):
        return moment
    return None


def _records(descriptor: int, position: int, end: int) -> Iterator[tuple[int, int]]:
    """The time of each record, and where it ends."""
    while position + RECORD_HEADER_BYTES <= end:
        header = os.pread(descriptor, RECORD_HEADER_BYTES, position)
        if len(header) < RECORD_HEADER_BYTES:
            return
        seconds, nanoseconds, captured, _ = _RECORD.unpack(header)
        position += RECORD_HEADER_BYTES + captured
        if captured > _LONGEST_RECORD or nanoseconds >= _NANOSECONDS or position > end:
            return
        yield seconds * _NANOSECONDS + nanoseconds, position
