"""One captured interface: a thread that moves packets from the kernel's ring to files and turns the files over.

Everything here happens once per batch of up to 4096 packets, never once per packet; only where a file is full are
the records of one batch looked at. A thread of its own, so that a disk
that stalls one capture stalls no other. The thread alone touches its handle and file; others read `status`, which is
replaced as a whole, and ask for things by `stop` and `flush`.
"""

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agent.capturer.dump import Buffer, Dump, WriteError, open_direct
from agent.capturer.libpcap import FILE_HEADER_BYTES, Handle, PcapError
from agent.capturer.protocol import FileStatus, InterfaceStatus, State, Target
from agent.capturer.wakeup import WakeUp
from api import names

_BATCH: Final = 4096
"""Packets per dispatch at most: the bound of what a stop, a flush or a rotation waits for."""

_SMALLEST_BATCH: Final = 64
_BATCH_BYTES: Final = 4 << 20  # about, by the size of the packets before
_TYPICAL_BYTES: Final = 1500
_BUFFER_BYTES: Final = 256 << 10
_DIRECT_BUFFER_BYTES: Final = 1 << 20
_FLUSH_SECONDS: Final = 1.0
_DRAIN_SECONDS: Final = 1.0
_DRAIN_POLL_SECONDS: Final = 0.005
_HANDOVER_MARGIN_SECONDS: Final = 0.02
_LONGEST_WAIT_SECONDS: Final = 3600.0  # poll(2) takes milliseconds in 31 bits
_RING_HEADER_BYTES: Final = 64  # of a packet in the ring, beyond those of its record in the file
_RING_BLOCK_BYTES: Final = 256 << 10  # of the ring, as libpcap makes them
_SHORTEST_REST_SECONDS: Final = 0.0025
_LONGEST_REST_SECONDS: Final = 0.01
_FILE_MODE: Final = 0o660  # the agent cuts off what a writer that died left half written

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Series:
    """What the files of one pod's interface have in common in their names."""

    prefix: str
    pod_uid: str

    @classmethod
    def of(cls, file_name: str) -> tuple["Series", int]:
        """The series of a valid file name, and its sequence number."""
        prefix, _, pod_uid, sequence = file_name.removesuffix(names.SUFFIX).rsplit("-", 3)
        return cls(prefix, pod_uid), int(sequence)


@dataclass(slots=True)
class _File:
    """The file being written; the `flushed_…` say how far a reader may trust it."""

    name: str
    created: int
    dump: Dump
    dropped_before: int
    end: int = FILE_HEADER_BYTES
    packets: int = 0
    last_batch: int = FILE_HEADER_BYTES
    first_packet_at: float | None = None
    flushed_size: int = 0
    flushed_packets: int = 0
    flushed_last_batch: int = FILE_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class _FlushRequest:
    """A flush that waits for what the kernel had received when it was asked for, though not for ever."""

    number: int
    packets: int
    until: float


class InterfaceCapture:
    """Captures one open handle into files of one directory until told to stop, or until either breaks."""

    def __init__(
        self,
        *,
        target: Target,
        interface: str,
        handle: Handle,
        directory: int,
        on_change: Callable[[], None],
        before: InterfaceStatus | None = None,
    ) -> None:
        """Own `handle` and `directory` (a descriptor) from now on; both are closed at the end.

        `on_change` is called in the capture's thread after `status` changed in a way that is worth telling. `before` is
        the last status of an interface of that name that went away; its numbers and files are gone on with.
        """
        self._target = target
        self._interface = interface
        self._handle = handle
        self._directory = directory
        self._on_change = on_change
        self._direct = target.direct
        self._buffer = Buffer(_DIRECT_BUFFER_BYTES if target.direct else _BUFFER_BYTES)
        self._wake = WakeUp()
        self._lock = threading.Lock()
        self._stopping = False
        self._flush_wanted = 0
        self._flush_request: _FlushRequest | None = None
        self._last_flush = float("-inf")
        self._unflushed = False
        self._before = before or InterfaceStatus(interface=interface, state=State.STARTING)
        self._packets = 0
        self._bytes = 0
        self._mean_size = _TYPICAL_BYTES
        self._dropped = 0
        self._counts_are_final = False
        self._closed: deque[FileStatus] = deque(self._before.files)
        self._earlier: deque[str] = deque()
        self._sequence = 0
        self._room_due = False
        self._file: _File | None = None
        self.flushed = 0
        self._publish(State.STARTING)
        self._thread = threading.Thread(target=self._run, name=f"capture {target.pod_name} {interface}")

    def start(self) -> None:
        """Begin; the state is Capturing, or Failed, by the first `on_change`."""
        try:
            self._thread.start()
        except RuntimeError as error:  # the system gives no more threads
            self._close(intact=True)
            self._publish(State.FAILED, "OpenFailed", f"capturing on {self._interface}: {error}")

    def join(self) -> None:
        """Wait for the end, which `stop` asks for."""
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """Ask for the end: nothing more is let in, what the kernel holds is still written."""
        self._stopping = True
        self._wake.set()

    def flush(self) -> int:
        """Ask that all packets seen so far reach the file; done once `flushed` is the number returned or more."""
        with self._lock:
            self._flush_wanted += 1
            wanted = self._flush_wanted
        self._wake.set()
        return wanted

    @property
    def ended(self) -> bool:
        return self.status.state.ended

    def _run(self) -> None:
        state, reason, message = State.STOPPED, "", ""
        try:
            self._find_earlier_files()
            self._open_next()
            self._room_due = True
            self._publish(State.CAPTURING)
            self._on_change()
            try:
                self._capture()
            except PcapError as error:
                state, reason, message = State.FAILED, "InterfaceFailed", f"capturing on {self._interface}: {error}"
            self._publish(State.STOPPING)
            self._drain()
            self._flush()
        except WriteError as error:
            state, reason, message = State.FAILED, "WriteFailed", f"writing the capture file: {error}"
        except OSError as error:
            state, reason, message = State.FAILED, "WriteFailed", f"opening a capture file: {error}"
        except Exception as error:
            log.exception("capture of %s on %s", self._target.id, self._interface)
            state, reason, message = State.FAILED, "InternalError", f"the capturer failed: {error!r}"
        try:
            self._close(intact=reason not in {"WriteFailed", "InternalError"})
        finally:
            self._publish(state, reason, message)
            self._on_change()

    def _capture(self) -> None:
        poll = select.poll()
        poll.register(self._handle.descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        woken = self._wake.fileno()
        emptied, waited = time.monotonic(), float("inf")
        earlier = self._bytes
        while not self._stopping:
            more = self._batch()
            self._keep_time()
            if not more and not self._stopping:
                now, size = time.monotonic(), self._bytes
                # After a longer wait nobody knows yet how fast they come now.
                if waited <= _LONGEST_REST_SECONDS and (
                    pause := pause_for(size - earlier, now - emptied, ring=self._target.ring_bytes)
                ):
                    time.sleep(pause)
                emptied, earlier = now, size
                waited = -time.monotonic()
                for descriptor, _ in poll.poll(self._milliseconds_to_wait()):
                    if descriptor == woken:
                        self._wake.clear()
                waited += time.monotonic()

    def _batch(self) -> bool:
        """Write the next waiting packets. Returns whether there may be more."""
        file = self._current
        dump, start = file.dump, file.end
        wanted = self._most_packets()
        packets = self._handle.dispatch(wanted, dump.pointer)
        if packets:
            end = dump.tell()
            size = end - start
            self._bytes += size + _RING_HEADER_BYTES * packets
            self._mean_size = size // packets
            dump.check()
            self._place(packets, start, end)
        return packets == wanted

    def _most_packets(self) -> int:
        """How many to take at once, so that what the file has no room for stays small in memory."""
        size = min(_BATCH_BYTES, 2 * self._target.max_file_bytes)
        return max(_SMALLEST_BATCH, min(_BATCH, size // self._mean_size))

    def _place(self, packets: int, start: int, end: int) -> None:
        """Count the packets that were written from `start` to `end`. What the file has no room for begins the next."""
        while packets:
            file = self._current
            rest = file.dump.split(start) if end > self._target.max_file_bytes else None
            kept = packets - rest.packets if rest is not None else packets
            if kept:
                file.end = file.dump.tell() if rest is not None else end
                file.packets += kept
                file.last_batch = start
                file.first_packet_at = file.first_packet_at or time.monotonic()
                self._packets += kept
                self._unflushed = True
            if rest is None:
                return
            self._rotate()
            self._current.dump.append(rest)
            packets, start, end = rest.packets, FILE_HEADER_BYTES, self._current.dump.tell()

    def _keep_time(self) -> None:
        """Flush and rotate by age when due."""
        now = time.monotonic()
        if self._flush_wanted <= self.flushed and now < self._due():
            return
        answered = self._answerable_flush(now)
        if answered is not None or (self._unflushed and now >= self._last_flush + _FLUSH_SECONDS):
            self._flush()
            first = self._packets > 0 and not self.status.packets
            self._publish(State.CAPTURING)
            if answered is not None:
                self.flushed = answered
                self._flush_request = None
            if first or answered is not None:
                self._on_change()
        if now >= self._rotation_due():
            self._rotate()

    def _answerable_flush(self, now: float) -> int | None:
        """The number of the flush that was asked for, once what the kernel held back then has been written.

        The kernel hands a block over at the second tick of its timer at the latest.
        """
        if self._flush_request is None:
            if self._flush_wanted <= self.flushed:
                return None
            received, dropped = self._handle.statistics()
            until = now + 2 * self._handle.timeout_milliseconds / 1000 + _HANDOVER_MARGIN_SECONDS
            self._flush_request = _FlushRequest(self._flush_wanted, received - dropped, until)
        request = self._flush_request
        return request.number if self._packets >= request.packets or now >= request.until else None

    def _milliseconds_to_wait(self) -> float | None:
        due = self._due()
        if self._flush_request is not None:
            due = min(due, self._flush_request.until)
        elif self._flush_wanted > self.flushed:
            return 0  # asked for while another one was answered
        if due == float("inf"):
            return None
        return min(max(0.0, due - time.monotonic()), _LONGEST_WAIT_SECONDS) * 1000 + 1

    def _due(self) -> float:
        """When to flush or to rotate, though nobody asks for it."""
        flush = self._last_flush + _FLUSH_SECONDS if self._unflushed else float("inf")
        return min(flush, self._rotation_due()) if self._target.max_file_age_seconds else flush

    def _rotation_due(self) -> float:
        """When the current file is too old. One without packets never is: it would push out one that has some."""
        age, first = self._target.max_file_age_seconds, self._current.first_packet_at
        return first + age if age and first is not None else float("inf")

    def _drain(self) -> None:
        """Close the gate and write what the kernel has not handed over yet: the block that it is filling.

        It hands that over in time also when the interface has gone, though libpcap then fails until it does.
        """
        self._handle.close_gate()
        shortest = time.monotonic() + self._handle.timeout_milliseconds / 1000 + _HANDOVER_MARGIN_SECONDS
        longest = shortest + _DRAIN_SECONDS
        while True:
            with contextlib.suppress(PcapError):
                while self._batch():
                    pass
            now = time.monotonic()
            received, dropped = self._handle.statistics()
            if now >= longest or (now >= shortest and self._packets >= received - dropped):
                return
            time.sleep(_DRAIN_POLL_SECONDS)

    def _rotate(self) -> None:
        self._flush()
        self._retire_current()
        self._make_room()
        self._open_next()
        self._publish(State.CAPTURING)
        self._on_change()

    def _flush(self) -> None:
        file = self._current
        file.dump.flush()
        file.flushed_size = file.dump.tell()
        file.flushed_packets = file.packets
        file.flushed_last_batch = file.last_batch
        self._count_dropped()
        self._last_flush = time.monotonic()
        self._unflushed = False
        if self._room_due and file.packets:
            self._make_room()

    def _count_dropped(self) -> None:
        """What the kernel had no room for; at the end all that it let in and that is in no file."""
        received, dropped = self._handle.statistics()
        self._dropped = received - self._packets if self._counts_are_final else dropped

    def _find_earlier_files(self) -> None:
        """The files of this pod's interface from before: they count against `max_files` too."""
        series, _ = Series.of(self._name(created=0))
        earlier = []
        for name in os.listdir(self._directory):
            if names.is_file_name(name):
                candidate, sequence = Series.of(name)
                if candidate == series:
                    earlier.append((sequence, name))
        earlier.sort()
        self._sequence = earlier[-1][0] + 1 if earlier else 0
        known = {file.name for file in self._closed}
        for name in [name for _, name in earlier if name not in known]:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_size > FILE_HEADER_BYTES:
                    self._earlier.append(name)
                else:
                    os.unlink(name, dir_fd=self._directory)

    def _make_room(self) -> None:
        """Remove the oldest files that are too many beside the current one.

        A capture that starts does so once its first packets are written: one that starts again and again without any
        traffic, or on a full disk, must not push out what it captured before.
        """
        self._room_due = False
        while len(self._earlier) + len(self._closed) >= self._target.max_files:
            oldest = self._earlier.popleft() if self._earlier else self._closed.popleft().name
            with contextlib.suppress(FileNotFoundError):
                os.unlink(oldest, dir_fd=self._directory)

    def _open_next(self) -> None:
        """Begin the next file."""
        created = time.time_ns()
        name = self._name(created=created)
        # The agent may write into the directory, so never follow a link it might have put there.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.ExitStack() as undo:
            descriptor = os.open(name, flags, _FILE_MODE, dir_fd=self._directory)
            undo.callback(os.close, descriptor)
            direct = open_direct(descriptor, self._buffer) if self._direct else None
            if direct is not None:
                undo.callback(os.close, direct)
            elif self._direct:
                log.warning("%s on %s: the file system takes no O_DIRECT", self._target.id, self._interface)
                self._direct = False
            limit = self._target.max_file_bytes
            dump = Dump(self._handle, descriptor, self._buffer, limit=limit, direct=direct)
            undo.pop_all()
        self._sequence += 1
        self._file = _File(name, created, dump, dropped_before=self._dropped)
        self._flush()  # the file header: an empty capture is a valid pcap from the first moment
        self._last_flush = float("-inf")  # and its first packet is to be seen at once

    def _name(self, *, created: int) -> str:
        return names.file_name(
            pod=self._target.pod_name,
            interface=self._interface,
            created_ns=created,
            pod_uid=self._target.pod_uid,
            sequence=self._sequence,
        )

    def _retire_current(self, *, intact: bool = True) -> None:
        """Close the current file for good; one that could not be written is cut back to its last flush.

        What is cut off is counted as dropped.
        """
        file = self._current
        self._file = None
        try:
            if not intact:
                self._packets -= file.packets - file.flushed_packets
                self._count_dropped()
                file.dump.cut(file.flushed_size)
        finally:
            file.dump.close()
            self._closed.append(self._file_status(file, open_=False))

    def _close(self, *, intact: bool) -> None:
        try:
            self._handle.close_gate()
            self._counts_are_final = True
            self._count_dropped()
            if self._file is not None:
                if intact:
                    try:
                        self._flush()
                    except WriteError as error:
                        log.warning("last flush of %s: %s", self._file.name, error)
                        intact = False
                self._retire_current(intact=intact)
        finally:
            self._handle.close()
            os.close(self._directory)
            self._wake.close()

    def _publish(self, state: State, reason: str = "", message: str = "") -> None:
        files = list(self._closed)
        if self._file is not None:
            files.append(self._file_status(self._file, open_=True))
        self.status = InterfaceStatus(
            interface=self._interface,
            state=state,
            reason=reason,
            message=message,
            packets=self._before.packets + self._packets,
            dropped=self._before.dropped + self._dropped,
            files=tuple(files),
        )

    def _file_status(self, file: _File, *, open_: bool) -> FileStatus:
        return FileStatus(
            name=file.name,
            interface=self._interface,
            created=file.created,
            size=file.flushed_size,
            packets=file.flushed_packets,
            dropped=self._dropped - file.dropped_before,
            last_batch_offset=file.flushed_last_batch,
            closed=None if open_ else time.time_ns(),
        )

    @property
    def _current(self) -> _File:
        if self._file is None:
            raise RuntimeError("no file is open")
        return self._file


def pause_for(size: int, seconds: float, *, ring: int) -> float:
    """How long to wait, in seconds, for a fuller ring after `size` bytes of it that came in `seconds`.

    To wake for each block costs nearly half as much as its packets. So until an eighth of the ring is full if they go
    on to come as fast, and never long; not at all when they come so slowly that the kernel's timer handed them over,
    nor when they come so fast that the ring may be full before the thread is woken.
    """
    if size < _RING_BLOCK_BYTES // 2:
        return 0.0
    pause = ring / 8 * seconds / size
    return min(_LONGEST_REST_SECONDS, pause) if pause >= _SHORTEST_REST_SECONDS else 0.0
