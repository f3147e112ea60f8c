"""Keeps capture files from filling the node: pure decisions over the list of files and the space that is left."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.reconcile import Verdict
from agent.store import StoredFile
from api.capturenode import Disk


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that all capture files of the node may take; and what must stay free of the file system.

    `free` in bytes, `free_percent` of its size: the larger of the two counts. kubelet evicts pods when less than 10 %
    are free, so the percentage is to be above that.
    """

    used: int
    free: int
    free_percent: int = 0

    def floor(self, disk: Disk) -> int:
        return max(self.free, disk.capacity * self.free_percent // 100)


@dataclass(frozen=True, slots=True)
class Decision:
    """The files to remove now, and, when that is not enough, why nothing is captured for the time being."""

    remove: tuple[StoredFile, ...]
    paused: Verdict | None


def measure(directory: Path, files: Sequence[StoredFile]) -> Disk:
    """The file system as it is. Raises OSError."""
    space = os.statvfs(directory)
    return Disk(
        capacity=space.f_blocks * space.f_frsize,
        free=space.f_bavail * space.f_frsize,
        used=sum(file.size for file in files),
    )


def decide(disk: Disk, files: Sequence[StoredFile], limits: Limits, *, paused: bool) -> Decision:
    """Finished files go, the oldest first (`files` are in that order), until both limits are kept.

    Files that are being written stay: when they are too much, captures pause. A pause ends only when there is an eighth
    of the limit to spare, so that it does not come and go.
    """
    floor = limits.floor(disk)
    excess = max(disk.used - limits.used, floor - disk.free)
    remove: list[StoredFile] = []
    for file in files:
        if excess <= 0:
            break
        if file.finished:
            remove.append(file)
            excess -= file.size
    removed = sum(file.size for file in remove)
    used, free = disk.used - removed, disk.free + removed
    most, least = (limits.used - limits.used // 8, floor + floor // 8) if paused else (limits.used, floor)
    if free < least:
        message = f"{_size(free)} are free on the node's disk and {_size(least)} must be: captures pause until they are"
    elif used > most:
        message = f"capture files take {_size(used)} of the node's disk, more than {_size(most)}: captures pause"
    else:
        return Decision(tuple(remove), None)
    return Decision(tuple(remove), Verdict("Error", "DiskPressure", message))


def _size(number: int) -> str:
    return f"{number / 1_000_000:.0f} MB"
