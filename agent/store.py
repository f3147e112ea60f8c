"""The capture files of this node: a directory per capture's UID, and beside each finished file a record of it.

The capturer writes and rotates the files; the agent, which shares its group, reads them, writes the records, and
removes what belongs to no capture any more. Until a file has its record, what is known of it is what the capturer told.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from agent import pcapfile
from agent.capturer.capture import Series
from agent.capturer.libpcap import FILE_HEADER_BYTES
from agent.capturer.protocol import FileStatus, Target, TargetStatus
from api import names
from api.files import PacketCaptureFile

RECORD_SUFFIX: Final = ".json"
COUNTERS_NAME: Final = "counters.json"
"""In a capture's directory, beside its files: what is counted of it."""

_TEMPORARY_SUFFIX: Final = ".new"
_READ_BYTES: Final = 1 << 20

log = logging.getLogger(__name__)


class FileRecord(PacketCaptureFile):
    """What is kept beside a finished file, for whoever finds the two."""

    state: Literal["Finished"] = "Finished"
    """Records are written of finished files only."""
    pod_uid: str
    """The pod's UID; after a crash of the agent only its first 8 digits are known."""
    addresses: list[str]
    """The pod's addresses."""
    filter: str
    """The filter, as libpcap compiled it."""
    snap_length: int | None = None
    """Bytes kept of each packet at most."""
    run: int
    """When the capture of the pod began that wrote it, in ns since 1970; the file's creation when nobody knows."""
    opened: str
    """When it was begun (RFC 3339, nanoseconds): what came between two files of an interface is in neither."""
    closed: str
    """When its last byte was written, at the latest."""
    recovered: bool
    """Whether its writer died: then what it had not written yet is in no file."""
    torn_bytes: int = 0
    """Bytes of a packet half written that were cut off its end."""
    write_error: str | None = None
    """Why the kernel could not bring all of it to the disk, if so: then some of it may be lost."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What the capturer last told of a file."""

    status: FileStatus
    target: Target
    run: int


@dataclass(frozen=True, slots=True)
class _End:
    """Where a file ends and what is in it, however its writer ended."""

    size: int
    packets: int
    first: int | None
    last: int | None
    closed: int
    torn: int = 0


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file on the disk, finished or not. `space` is what it takes of the disk together with its record, in bytes."""

    capture_uid: str
    name: str
    size: int
    finished: bool
    space: int


@dataclass(frozen=True, slots=True)
class Readable:
    """An open file of which `size` bytes may be read. Whoever got it closes `descriptor`."""

    descriptor: int
    size: int
    finished: bool
    sha256: str | None


class Store:
    """All capture files below one directory."""

    def __init__(
        self,
        directory: Path,
        *,
        node: str,
        engaged: Callable[[], Collection[str] | None],
        on_error: Callable[[], object] = lambda: None,
    ) -> None:
        """`engaged` tells which targets' files may be written to right now; None when nobody knows.

        `on_error` is called, in any thread, for each file and directory that is skipped because it can't be read.
        """
        self._directory = directory
        self._node = node
        self._engaged = engaged
        self._on_error = on_error
        self._said: set[str] = set()
        self._irremovable: set[tuple[str, str]] = set()
        self._known: dict[str, dict[str, _Known]] = {}
        self._records: dict[str, dict[str, FileRecord]] = {}
        self._times: dict[tuple[str, str], tuple[int, int | None, int | None]] = {}
        self._strangers: set[str] = set()
        self._finishing = asyncio.Lock()

    def observe(self, status: TargetStatus) -> bool:
        """Take note of what the capturer says of a target's files. Returns whether a file is new, or was closed."""
        known = self._known.setdefault(status.target.capture_uid, {})
        news = False
        for interface in status.interfaces:
            for file in interface.files:
                earlier = known.get(file.name)
                news |= earlier is None or earlier.status.open != file.open
                known[file.name] = _Known(file, status.target, status.started)
        return news

    async def files(self, capture_uid: str) -> list[PacketCaptureFile]:
        """The capture's files, by name. One whose writer died is listed once its record is written."""
        return await asyncio.to_thread(self._list, capture_uid)

    async def open(self, capture_uid: str, name: str) -> Readable:
        """Open a file for reading. Raises FileNotFoundError."""
        return await asyncio.to_thread(self._open, capture_uid, name)

    def target_of(self, capture_uid: str, name: str) -> str | None:
        """The target that is writing the file, None when it is finished or unknown."""
        known = self._known.get(capture_uid, {}).get(name)
        return known.target.id if known is not None and known.status.open else None

    async def finish(self, *, on_record: Callable[[str, FileRecord], None]) -> None:
        """Write the records that are missing. `on_record` gets each of them, with the capture's UID."""
        async with self._finishing:
            await self._finish(on_record)
            await asyncio.to_thread(self._remove_superseded)

    async def _finish(self, on_record: Callable[[str, FileRecord], None]) -> None:
        before = self._engaged()
        present = await asyncio.to_thread(lambda: list(self._unrecorded()))
        after = self._engaged()
        engaged = None if before is None or after is None else frozenset(before) | frozenset(after)
        for capture_uid, name in present:
            known = self._known.get(capture_uid, {}).get(name)
            closed = known is not None and not known.status.open
            if not closed and not self._is_abandoned(capture_uid, name, engaged):
                continue
            try:
                record = await asyncio.to_thread(self._record, capture_uid, name, known)
            except FileNotFoundError:
                continue  # rotated away meanwhile
            except OSError as error:
                log.warning("record of %s: %s", name, error)
                continue
            # Asked here and not in the thread: what is counted of files that went is put away by this thread too.
            if not (self._directory / capture_uid / name).exists():
                await asyncio.to_thread(self._remove, capture_uid, name)
                continue
            if record.recovered:
                log.warning(
                    "%s was left by a capturer that died: %d packets in it, %d torn bytes at its end",
                    name,
                    record.packets,
                    record.torn_bytes,
                )
            on_record(capture_uid, record)

    async def usage(self) -> list[StoredFile]:
        """Every file, oldest first."""
        return await asyncio.to_thread(self._usage)

    async def records(self) -> list[tuple[str, FileRecord]]:
        """The records of all finished files, each with the capture's UID."""
        return await asyncio.to_thread(self._all_records)

    async def remove(self, capture_uid: str, name: str) -> None:
        """Remove one file and its record. Raises OSError, and then `usage` says of the file that it has to stay."""
        try:
            await asyncio.to_thread(self._remove, capture_uid, name)
        except OSError:
            self._irremovable.add((capture_uid, name))
            raise

    async def counters(self) -> dict[str, bytes]:
        """What `keep_counters` wrote, by the capture's UID. To be called before anything is written."""
        return await asyncio.to_thread(self._all_counters)

    async def keep_counters(self, contents: Mapping[str, bytes]) -> list[str]:
        """Keep what is counted of captures, by their UIDs, for as long as their directories are there.

        Returns those whose counters could not be written.
        """
        return await asyncio.to_thread(self._keep_counters, contents)

    async def retain(self, capture_uids: Collection[str], *, writing: Callable[[], Collection[str]]) -> list[str]:
        """Remove the files of all captures but these and those of targets in `writing`. Returns whose were removed."""
        gone = []
        await asyncio.to_thread(self._name_strangers)
        for capture_uid in await asyncio.to_thread(self._capture_uids):
            busy = {target_id.split("/")[0] for target_id in writing()}
            if capture_uid not in capture_uids and capture_uid not in busy:
                log.info("removing the files of capture %s, which is gone", capture_uid)
                try:
                    await asyncio.to_thread(shutil.rmtree, self._directory / capture_uid)
                except OSError as error:
                    log.warning("removing the files of capture %s: %s", capture_uid, error)
                    continue
                self._known.pop(capture_uid, None)
                self._records.pop(capture_uid, None)
                for key in [key for key in list(self._times) if key[0] == capture_uid]:
                    self._times.pop(key, None)
                gone.append(capture_uid)
        return gone

    def _capture_uids(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self._directory) if names.is_uid(name)]
        return []  # the capturer makes the directory when it starts

    def _name_strangers(self) -> None:
        """Say once what lies here that is not ours; it is left alone."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                if not names.is_uid(name) and not name.startswith(".") and name not in self._strangers:
                    self._strangers.add(name)
                    log.warning("%s is not of ours and is left alone", self._directory / name)

    def _all_counters(self) -> dict[str, bytes]:
        contents = {}
        for capture_uid in self._capture_uids():
            with self._skipping(f"counters of capture {capture_uid}"):
                self._clear_unfinished(capture_uid)
                contents[capture_uid] = (self._directory / capture_uid / COUNTERS_NAME).read_bytes()
        return contents

    def _clear_unfinished(self, capture_uid: str) -> None:
        """Remove what an agent that died was about to write."""
        for name in os.listdir(self._directory / capture_uid):
            if name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX):
                (self._directory / capture_uid / name).unlink(missing_ok=True)

    def _keep_counters(self, contents: Mapping[str, bytes]) -> list[str]:
        failed = []
        for capture_uid, content in contents.items():
            try:
                _write_atomically(self._directory / capture_uid / COUNTERS_NAME, content)
            except FileNotFoundError:
                continue  # without a directory it has no files, and never had
            except OSError as error:
                log.warning("counters of capture %s: %s", capture_uid, error)
                failed.append(capture_uid)
        return failed

    def _names(self, capture_uid: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self._directory / capture_uid) if names.is_file_name(name))
        return []

    def _remove_superseded(self) -> None:
        """Remove finished files without a packet where the same interface has a later one.

        Runs that fail again and again would leave any number of them.
        """
        for capture_uid in self._capture_uids():
            latest: dict[Series, str] = {}
            for name in sorted(self._readable_names(capture_uid), key=names.created):
                series, _ = Series.of(name)
                earlier, latest[series] = latest.get(series), name
                record = self._read_record(capture_uid, earlier) if earlier else None
                if record is not None and not record.received and not record.packets:
                    with self._skipping(f"removing {record.name} of capture {capture_uid}"):
                        self._remove(capture_uid, record.name)

    def _readable_names(self, capture_uid: str) -> list[str]:
        """The same; of a directory that can't be read none."""
        try:
            return self._names(capture_uid)
        except OSError as error:
            self._skip(f"files of capture {capture_uid}", error)
            return []

    @contextlib.contextmanager
    def _skipping(self, what: str) -> Iterator[None]:
        """Go on without what can't be read; when it is gone there is nothing to say."""
        try:
            yield
        except FileNotFoundError:
            return
        except OSError as error:
            self._skip(what, error)

    def _skip(self, what: str, error: OSError) -> None:
        """Count it each time, and say it once."""
        self._on_error()
        text = f"{what}: {error}"
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    def _list(self, capture_uid: str) -> list[PacketCaptureFile]:
        return [file for name in self._names(capture_uid) if (file := self._describe(capture_uid, name)) is not None]

    def _describe(self, capture_uid: str, name: str) -> PacketCaptureFile | None:
        record = self._read_record(capture_uid, name)
        if record is not None:
            return PacketCaptureFile(**record.model_dump(include=set(PacketCaptureFile.model_fields), by_alias=False))
        known = self._known.get(capture_uid, {}).get(name)
        if known is None:
            return None
        file = known.status
        try:
            first, last = self._live_times(capture_uid, file)
        except FileNotFoundError:
            return None
        return PacketCaptureFile(
            node=self._node,
            pod=known.target.pod_name,
            interface=file.interface,
            name=name,
            size=file.size,
            packets=file.packets,
            received=file.packets + file.dropped,
            dropped=file.dropped,
            first_packet_time=_format(first),
            last_packet_time=_format(last),
            state="Writing" if file.open else "Finished",
        )

    def _live_times(self, capture_uid: str, file: FileStatus) -> tuple[int | None, int | None]:
        kept = self._times.get((capture_uid, file.name))
        if kept is None or kept[0] != file.size:
            with _opened(self._directory / capture_uid / file.name) as descriptor:
                kept = file.size, *_times(descriptor, file)
            self._times[capture_uid, file.name] = kept
        return kept[1], kept[2]

    def _open(self, capture_uid: str, name: str) -> Readable:
        descriptor = os.open(self._directory / capture_uid / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        record = self._read_record(capture_uid, name)
        if record is not None:
            return Readable(descriptor, record.size, finished=True, sha256=record.sha256)
        known = self._known.get(capture_uid, {}).get(name)
        if known is not None:
            return Readable(descriptor, known.status.size, finished=not known.status.open, sha256=None)
        os.close(descriptor)
        raise FileNotFoundError(f"{name} has no record yet")

    def _unrecorded(self) -> Iterator[tuple[str, str]]:
        for capture_uid in self._capture_uids():
            for name in self._readable_names(capture_uid):
                if self._read_record(capture_uid, name) is None:
                    yield capture_uid, name

    def _all_records(self) -> list[tuple[str, FileRecord]]:
        return [
            (capture_uid, record)
            for capture_uid in self._capture_uids()
            for name in self._readable_names(capture_uid)
            if (record := self._read_record(capture_uid, name)) is not None
        ]

    def _is_abandoned(self, capture_uid: str, name: str, engaged: Collection[str] | None) -> bool:
        """Whether nobody writes the file any more, though nobody told that it was closed."""
        if engaged is None:
            return False
        series, sequence = Series.of(name)
        if not any(target_id.startswith(f"{capture_uid}/{series.pod_uid}") for target_id in engaged):
            return True
        for other, known in list(self._known.get(capture_uid, {}).items()):
            other_series, other_sequence = Series.of(other)
            if known.status.open and other_series == series and other_sequence > sequence:
                return True
        return False

    def _read_record(self, capture_uid: str, name: str) -> FileRecord | None:
        kept = self._records.get(capture_uid, {}).get(name)
        if kept is not None:
            return kept
        try:
            text = (self._directory / capture_uid / f"{name}{RECORD_SUFFIX}").read_bytes()
            record = FileRecord.model_validate_json(text)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("the record of %s can't be read and is made anew: %s", name, error)
            return None
        self._records.setdefault(capture_uid, {})[name] = record
        return record

    def _record(self, capture_uid: str, name: str, known: _Known | None) -> FileRecord:
        """Make the record and write it. Raises FileNotFoundError when the file is gone, or not even begun."""
        path = self._directory / capture_uid / name
        closed = known is not None and not known.status.open
        with _opened(path) as descriptor:
            end = _closed_end(descriptor, known.status) if known and closed else _torn_end(descriptor, known)
            if not end.size:
                path.unlink()
                raise FileNotFoundError(f"{name} ended within its header")
            if end.torn:
                _cut(path, end.size)
            write_error = _sync(descriptor)
            if write_error:
                log.warning("%s did not reach the disk: %s", name, write_error)
            digest = _sha256(descriptor, end.size)
        series, _ = Series.of(name)
        pod, _, interface = series.prefix.partition("_")
        opened = names.created(name)
        # Packets that were told and are not there were lost with the node's page cache.
        dropped = known.status.dropped + max(0, known.status.packets - end.packets) if known else 0
        record = FileRecord(
            node=self._node,
            pod=known.target.pod_name if known else pod,
            interface=known.status.interface if known else interface,
            name=name,
            size=end.size,
            packets=end.packets,
            received=end.packets + dropped,
            dropped=dropped,
            first_packet_time=_format(end.first),
            last_packet_time=_format(end.last),
            sha256=digest,
            pod_uid=known.target.pod_uid if known else series.pod_uid,
            addresses=list(known.target.pod_addresses) if known else [],
            filter=known.target.filter if known else "",
            snap_length=known.target.snap_length if known else None,
            run=known.run if known else opened,
            opened=names.format_time(opened),
            closed=names.format_time(end.closed),
            recovered=not closed,
            torn_bytes=end.torn,
            write_error=write_error,
        )
        _write_atomically(path.with_name(f"{name}{RECORD_SUFFIX}"), record.model_dump_json(exclude_none=True).encode())
        self._records.setdefault(capture_uid, {})[name] = record
        return record

    def _usage(self) -> list[StoredFile]:
        """Also forgets what rotation has removed."""
        files = []
        for capture_uid in self._capture_uids():
            with self._skipping(f"usage of capture {capture_uid}"):
                known = [*self._records.get(capture_uid, {}), *self._known.get(capture_uid, {})]
                entries = set(os.listdir(self._directory / capture_uid))
                present = {name for name in entries if names.is_file_name(name)}
                self._forget_rotated(capture_uid, entries, gone={name for name in known if name not in present})
                files += [file for name in present if (file := self._stored(capture_uid, name)) is not None]
        return sorted(files, key=lambda file: (file.name.rsplit("-", 3)[1], file.name))

    def _stored(self, capture_uid: str, name: str) -> StoredFile | None:
        try:
            path = self._directory / capture_uid / name
            size, space = _size_and_space(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._skip(f"size of {name} of capture {capture_uid}", error)
            return None
        known = self._known.get(capture_uid, {}).get(name)
        # On a full disk no record can be written, and the file has to go nevertheless.
        closed = known is not None and not known.status.open
        finished = closed or self._read_record(capture_uid, name) is not None
        with self._skipping(f"size of the record of {name} of capture {capture_uid}"):
            space += _size_and_space(path.with_name(f"{name}{RECORD_SUFFIX}"))[1]
        finished &= (capture_uid, name) not in self._irremovable
        return StoredFile(capture_uid, name, size, finished, space)

    def _forget_rotated(self, capture_uid: str, entries: Collection[str], *, gone: Collection[str]) -> None:
        for entry in entries:
            name = entry.removesuffix(RECORD_SUFFIX)
            if entry != name and names.is_file_name(name) and name not in entries:
                with self._skipping(f"removing {entry} of capture {capture_uid}"):
                    (self._directory / capture_uid / entry).unlink()
        for name in gone:
            self._irremovable.discard((capture_uid, name))
            self._records.get(capture_uid, {}).pop(name, None)
            self._known.get(capture_uid, {}).pop(name, None)
            self._times.pop((capture_uid, name), None)

    def _remove(self, capture_uid: str, name: str) -> None:
        path = self._directory / capture_uid / name
        path.unlink(missing_ok=True)
        path.with_name(f"{name}{RECORD_SUFFIX}").unlink(missing_ok=True)
        self._records.get(capture_uid, {}).pop(name, None)


def _times(descriptor: int, file: FileStatus) -> tuple[int | None, int | None]:
    """When the first and the last packet were seen, from the first header and those of the last batch."""
    last = pcapfile.walk(descriptor, start=file.last_batch_offset, end=file.size).last
    return pcapfile.first_time(descriptor, file.size), last


def _closed_end(descriptor: int, file: FileStatus) -> _End:
    """Of a file that was closed well: as the capturer told."""
    first, last = _times(descriptor, file)
    return _End(file.size, file.packets, first, last, file.closed or file.created)


def _torn_end(descriptor: int, known: _Known | None) -> _End:
    """Of a file whose writer died: its last whole packet. What was told of it need not be walked again."""
    status = os.fstat(descriptor)
    if known is not None and FILE_HEADER_BYTES <= known.status.size <= status.st_size:
        told = known.status
        walk = pcapfile.walk(descriptor, start=told.size, end=status.st_size)
        first, last = _times(descriptor, told)
        packets = told.packets + walk.packets
        first, last = first if told.packets else walk.first, walk.last if walk.packets else last
    else:
        walk = pcapfile.whole_size(descriptor)
        packets, first, last = walk.packets, walk.first, walk.last
    return _End(walk.end, packets, first, last, status.st_mtime_ns, torn=status.st_size - walk.end)


def _size_and_space(path: Path) -> tuple[int, int]:
    """How long a file is, and what it takes of the disk, in bytes: whole blocks. Raises OSError."""
    status = path.stat(follow_symlinks=False)
    return status.st_size, max(status.st_size, status.st_blocks * 512)  # blocks may be given only when written back


def _cut(path: Path, size: int) -> None:
    """Cut off what is torn. Where that can't be done no more than `size` is served all the same."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("the torn end of %s stays: %s", path.name, error)


def _sync(descriptor: int) -> str | None:
    """Have the kernel write what it holds of the file. Returns why it can't, or could not earlier (fsync(2))."""
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        return str(error)
    return None


def _format(moment: int | None) -> str | None:
    return names.format_time(moment) if moment is not None else None


def _sha256(descriptor: int, size: int) -> str:
    digest = hashlib.sha256()
    position = 0
    while position < size:
        data = os.pread(descriptor, min(_READ_BYTES, size - position), position)
        if not data:
            raise OSError(f"the file ends at byte {position} of {size}")
        digest.update(data)
        position += len(data)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, content: bytes) -> None:
    """After a crash there is the old content or the new, but no half of it. Raises OSError."""
    # A name of its own: a write whose waiter was cancelled goes on.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk it would take what is left
        raise
