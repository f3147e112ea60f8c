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
    """Bytes that all capture files of the node may take, and bytes of the file system that must stay free."""

    used: int
    free: int


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

    Files that are being written stay. A pause ends only when an eighth more than the floor is free, so that it does not
    come and go.
    """
    excess = max(disk.used - limits.used, limits.free - disk.free)
    remove: list[StoredFile] = []
    for file in files:
        if excess <= 0:
            break
        if file.finished:
            remove.append(file)
            excess -= file.size
    free = disk.free + sum(file.size for file in remove)
    floor = limits.free + limits.free // 8 if paused else limits.free
    if free < floor:
        message = f"{_size(free)} are free on the node's disk and {_size(floor)} must be: captures pause until they are"
        return Decision(tuple(remove), Verdict("Error", "DiskPressure", message))
    return Decision(tuple(remove), None)


def _size(number: int) -> str:
    return f"{number / 1_000_000:.0f} MB"
