"""Keeps capture files from filling the node: pure decisions over the list of files and the space that is left."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent.reconcile import Pauses, Verdict
from agent.store import StoredFile
from api.capturenode import Disk


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that capture files of the node, and of each namespace on it, may take; and what must stay free.

    `free` in bytes, `free_percent` of the file system's size: the larger of the two counts. kubelet evicts pods when
    less than 10 % are free, so the percentage is to be above that.
    """

    used: int
    free: int
    free_percent: int = 0
    namespace: int = 1 << 60
    free_files_percent: int = 5
    """Of the files (inodes) that the file system can hold so many percent must stay free: small ones take these."""

    def floor(self, disk: Disk) -> int:
        return max(self.free, disk.capacity * self.free_percent // 100)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose files they are: the capture's namespace, and the bytes that its policy allows it on this node."""

    namespace: str
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The files to remove now, and, where that is not enough, what is not captured for the time being.

    `allowance` is how many bytes may be written until all this must be looked at again.
    """

    remove: tuple[StoredFile, ...]
    paused: Pauses
    allowance: int


@dataclass(frozen=True, slots=True)
class Inodes:
    """Files that the file system can hold, and how many more. Some file systems don't say: both are 0."""

    capacity: int = 0
    free: int = 0


def measure_inodes(directory: Path) -> Inodes:
    """As they are. Raises OSError."""
    space = os.statvfs(directory)
    return Inodes(space.f_files, space.f_favail)


_NO_INODES: Final = Inodes()


def measure(directory: Path, files: Sequence[StoredFile]) -> Disk:
    """The file system as it is. Raises OSError."""
    space = os.statvfs(directory)
    return Disk(
        capacity=space.f_blocks * space.f_frsize,
        free=space.f_bavail * space.f_frsize,
        used=sum(file.space for file in files),
    )


def free_bytes(directory: Path) -> int:
    """What is free of the file system. Raises OSError."""
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def decide(
    disk: Disk,
    files: Sequence[StoredFile],
    limits: Limits,
    *,
    owners: Mapping[str, Owner],
    paused: Pauses,
    inodes: Inodes = _NO_INODES,
) -> Decision:
    """In each scope that is over its limit finished files go, the oldest first (`files` are in that order).

    Files that are being written stay: when they are too much, the captures of that scope pause, and no others. A pause
    ends only when there is an eighth of the limit to spare, so that it does not come and go; older files make room for
    that too. `owners` are the captures by UID; a file of none counts for the node alone.
    """
    guard = _Guard(files)
    captures = _pause_each(
        guard,
        {uid: owner.limit for uid, owner in owners.items() if owner.limit is not None},
        scope_of=lambda file: file.capture_uid,
        paused=paused.captures,
        message="the files of this capture take {used} of the node's disk, and its policy allows {limit} "
        "(limits.maxBytesPerNode): it pauses",
    )
    namespaces = _pause_each(
        guard,
        {owner.namespace: limits.namespace for owner in owners.values()},
        scope_of=lambda file: owners[file.capture_uid].namespace if file.capture_uid in owners else None,
        paused=paused.namespaces,
        message="capture files of this namespace take {used} of the node's disk, and {limit} are allowed "
        "(MAX_NAMESPACE_BYTES): its captures pause",
    )
    full = guard.keep_inodes(inodes, limits, paused.node)
    node = guard.keep_node(disk, limits, paused.node) or full
    return Decision(tuple(guard.removed), Pauses(node, namespaces, captures), guard.allowance)


def _pause_each(
    guard: "_Guard",
    limits: Mapping[str, int],
    *,
    scope_of: Callable[[StoredFile], str | None],
    paused: Mapping[str, Verdict],
    message: str,
) -> dict[str, Verdict]:
    files: defaultdict[str | None, list[StoredFile]] = defaultdict(list)
    for file in guard.files:
        files[scope_of(file)].append(file)
    verdicts = {}
    for scope, limit in limits.items():
        used = guard.keep(files[scope], limit=limit, paused=scope in paused)
        if used is not None:
            text = message.format(used=_size(used), limit=_size(limit))
            verdicts[scope] = paused.get(scope) or Verdict("Error", "DiskPressure", text)
    return verdicts


@dataclass(slots=True)
class _Guard:
    """The files, as scope after scope takes away from them."""

    _all: Sequence[StoredFile]
    removed: dict[StoredFile, None] = field(default_factory=dict)
    allowance: int = 1 << 60

    @property
    def files(self) -> list[StoredFile]:
        return [file for file in self._all if file not in self.removed]

    def keep(self, files: Sequence[StoredFile], *, limit: int, paused: bool) -> int | None:
        """Remove what is too much. Returns what the files take when that is still too much, else None."""
        used = sum(file.space for file in files)
        most = limit - limit // 8 if paused else limit
        used -= self._remove(files, used - most)
        self._allow(limit - used, limit)
        return used if used > most else None

    def keep_node(self, disk: Disk, limits: Limits, paused: Verdict | None) -> Verdict | None:
        floor = limits.floor(disk)
        least = floor + floor // 8 if paused else floor
        most = limits.used - limits.used // 8 if paused else limits.used
        remaining = self.files
        used, free = sum(file.space for file in remaining), disk.free + sum(file.space for file in self.removed)
        removed = self._remove(remaining, max(used - most, least - free))
        used, free = used - removed, free + removed
        self._allow(limits.used - used, limits.used)
        self._allow(free - floor, floor)
        if free < least:
            message = f"{_size(free)} are free on the node's disk and {_size(least)} must be: captures pause until then"
        elif used > most:
            message = f"capture files take {_size(used)} of the node's disk, and {_size(most)} are allowed "
            message += "(MAX_USED_BYTES): captures pause"
        else:
            return None
        return paused or Verdict("Error", "DiskPressure", message)

    def keep_inodes(self, inodes: Inodes, limits: Limits, paused: Verdict | None) -> Verdict | None:
        """Each file has a record: that makes two. Bytes and files share the node's verdict."""
        floor = inodes.capacity * limits.free_files_percent // 100
        least = floor + floor // 8 if paused else floor
        missing = least - inodes.free - 2 * len(self.removed)
        going = [file for file in self.files if file.finished][: max(0, -(-missing // 2))]
        self.removed.update(dict.fromkeys(going))
        if missing <= 2 * len(going):
            return None
        message = f"{inodes.free} more files fit on the node's disk and {least} must: captures pause until then"
        return paused or Verdict("Error", "DiskPressure", message)

    def _remove(self, files: Iterable[StoredFile], excess: int) -> int:
        removed = 0
        for file in files:
            if removed >= excess:
                break
            if file.finished:
                self.removed[file] = None
                removed += file.space
        return removed

    def _allow(self, left: int, whole: int) -> None:
        """Half of what is left; but where hardly any is, as in a scope that stays at its limit, still a step."""
        self.allowance = min(self.allowance, max(left // 2, whole // 256))


def _size(number: int) -> str:
    return f"{number / 1_000_000:,.0f} MB"
