"""A pcap file being written, of which no byte ever lies beyond its limit.

libpcap's `pcap_dump` writes each packet to a C stream. That stream is ours (fopencookie(3)): it fills a buffer, and
what it would write comes to `Dump` once for each full buffer. What the file has no room for stays in memory, and the
next file begins with it. So a dispatch need not know how large the packets are that wait in the ring, and each file is
filled to the last packet that fits.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Final

from agent.capturer.libpcap import RECORD_HEADER_BYTES, Handle

_IOFBF: Final = 0
_DISK_BLOCK_BYTES: Final = 4096
_CAPTURED: Final = struct.Struct("=8xI4x")

_pointer = ctypes.c_void_p
_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, _pointer, _pointer, ctypes.c_size_t)


class _CookieFunctions(ctypes.Structure):
    """`cookie_io_functions_t`: a stream that can only be written needs no other."""

    _fields_ = (("read", _pointer), ("write", _Write), ("seek", _pointer), ("close", _pointer))


_libc = ctypes.CDLL(None, use_errno=True)
for _name, _result, _arguments in (
    ("fopencookie", _pointer, (_pointer, ctypes.c_char_p, _CookieFunctions)),
    ("setvbuf", ctypes.c_int, (_pointer, _pointer, ctypes.c_int, ctypes.c_size_t)),
    ("fwrite", ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, _pointer)),
    ("fclose", ctypes.c_int, (_pointer,)),
    ("__fpending", ctypes.c_size_t, (_pointer,)),
    ("__fpurge", None, (_pointer,)),
):
    _function = getattr(_libc, _name)
    _function.restype = _result
    _function.argtypes = _arguments
_pending = getattr(_libc, "__fpending")
_purge = getattr(_libc, "__fpurge")


class WriteError(Exception):
    """The capture file can't be written; `errno` says why (ENOSPC, EIO, …)."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class Buffer:
    """Memory for one file's stream: glibc ignores setvbuf's size unless the memory comes with it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size)  # on a page's boundary, as O_DIRECT wants it; costs nothing until it is used
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


@dataclass(frozen=True, slots=True)
class Rest:
    """Whole records for which a file had no room."""

    data: bytes
    packets: int


class Dump:
    """The file. Between two dispatches it ends at a record's boundary."""

    def __init__(
        self, handle: Handle, descriptor: int, buffer: Buffer, *, limit: int, direct: int | None = None
    ) -> None:
        """Begin a file with its header.

        `descriptor`, open for reading and writing, and `direct`, another one of the same file that was opened with
        O_DIRECT, are closed with the dump. With `direct`, full buffers are written past the page cache. `limit` is in
        bytes. Raises PcapError, OSError; then both are the caller's still.
        """
        self._descriptor = descriptor
        self._direct = direct
        self._buffer = buffer
        self._limit = limit
        self._written = 0
        self._copied = 0
        self._beyond = bytearray()
        self._error: int | None = None
        self._write_callback = _Write(self._take)  # must outlive the stream, as the buffer must
        self._stream: int | None = _libc.fopencookie(None, b"w", _CookieFunctions(write=self._write_callback))
        if not self._stream:
            raise OSError(ctypes.get_errno(), "fopencookie")
        _libc.setvbuf(self._stream, buffer.address, _IOFBF, buffer.size)
        try:
            self.pointer = handle.dump_to(self._stream)
        except BaseException:
            _libc.fclose(self._stream)
            raise

    def tell(self) -> int:
        """Where the last packet ends that was dispatched, be it in the file, in memory, or beyond the limit."""
        return self._written + len(self._beyond) + self._pending

    def check(self) -> None:
        """Raise WriteError if a write failed: pcap_dump returns nothing."""
        if self._error is not None:
            raise WriteError(self._error)

    def flush(self) -> None:
        """Let the file hold everything. Raises WriteError.

        What the stream holds is copied to where it will write the same later, so that it goes on writing full buffers.
        """
        self.check()
        start, end = max(self._copied, self._written), self.tell()
        self._put(self._buffer.view[start - self._written : end - self._written], start)
        self._copied = end

    def split(self, start: int) -> Rest:
        """End the file, when it is over its limit, with the last packet that has room; the others. Raises WriteError.

        `start` is a record's boundary within the limit, not far before it.
        """
        self.check()
        base = min(start, self._written)
        try:
            written = os.pread(self._descriptor, self._written - base, base)
        except OSError as error:
            raise WriteError(error.errno or errno.EIO) from error
        data = b"".join((written, self._beyond, self._buffer.view[: self._pending]))
        position = start - base
        while base + (after := _after(data, position)) <= self._limit:
            position = after
        packets, after = 0, position
        while after < len(data):
            packets, after = packets + 1, _after(data, after)
        self._discard()
        end = base + position
        if end < self._written:
            self._truncate(end)
        else:
            self._put(memoryview(data)[self._written - base : position], self._written)
        self._written = self._copied = end
        return Rest(data[position:], packets)

    def append(self, rest: Rest) -> None:
        """Write what another file had no room for. Raises WriteError."""
        _libc.fwrite(rest.data, 1, len(rest.data), self._stream)
        self.check()

    def cut(self, size: int) -> None:
        """Let the file end at `size`, whatever was written beyond it. Raises OSError."""
        self._discard()
        self._written = self._copied = size
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        if self._stream is not None:
            self._discard()
            _libc.fclose(self._stream)
            self._stream = None
            os.close(self._descriptor)
            if self._direct is not None:
                os.close(self._direct)

    @property
    def _pending(self) -> int:
        return int(_pending(self._stream))

    def _take(self, _cookie: int | None, address: int, size: int) -> int:
        """What the stream writes. Called by C, so nothing may be raised: 0 is an error."""
        if self._error is not None:
            return 0
        data = (ctypes.c_char * size).from_address(address)
        if self._beyond or self._written + size > self._limit:
            self._beyond += data
            return size
        direct = (
            self._direct
            if size % _DISK_BLOCK_BYTES == self._written % _DISK_BLOCK_BYTES == address % _DISK_BLOCK_BYTES == 0
            else None
        )
        try:
            self._put(memoryview(data), self._written, direct=direct)
        except WriteError as error:
            self._error = error.errno
            return 0
        self._written += size
        return size

    def _put(self, data: memoryview, position: int, *, direct: int | None = None) -> None:
        descriptor = self._descriptor if direct is None else direct
        try:
            while data:
                count = os.pwrite(descriptor, data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise WriteError(error.errno or errno.EIO) from error

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise WriteError(error.errno or errno.EIO) from error

    def _discard(self) -> None:
        """Forget what is not in the file."""
        _purge(self._stream)
        self._beyond.clear()


def open_direct(descriptor: int, buffer: Buffer) -> int | None:
    """Another descriptor of this file with O_DIRECT; None when the file system does not take it. Raises OSError.

    An empty file is written to for that, since some file systems refuse no sooner.
    """
    try:
        # Not by name, which could mean another file by now; and not a duplicate, which would share the flag.
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:
        if os.fstat(descriptor).st_size == 0:
            os.pwrite(direct, buffer.view[:_DISK_BLOCK_BYTES], 0)
            os.ftruncate(descriptor, 0)
    except OSError as error:
        os.close(direct)
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    return direct


def _after(data: bytes, position: int) -> int:
    """Where the record ends that begins there; beyond all limits where there is none."""
    if position + RECORD_HEADER_BYTES > len(data):
        return 1 << 62
    (captured,) = _CAPTURED.unpack_from(data, position)
    return position + RECORD_HEADER_BYTES + int(captured)
