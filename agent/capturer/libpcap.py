"""libpcap by ctypes: only what a capture to files needs, and nothing that runs per packet.

`Handle.dispatch` hands packets to libpcap's own `pcap_dump`, so the way from the kernel's ring to the file is C from
end to end, with the GIL released. The functions are those of pcap(3PCAP) in libpcap 1.10, on Linux.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import socket
import struct
from typing import Final

_SUCCESS: Final = 0
_NETMASK_UNKNOWN: Final = 0xFFFFFFFF
_PRECISION_NANO: Final = 1
_SO_ATTACH_FILTER: Final = 26
_SOL_PACKET: Final = 263
_PACKET_IGNORE_OUTGOING: Final = 23
_NO_PROTOCOL: Final = (
    0xFF  # below 0x600 the field of an Ethernet frame is a length, and Linux uses this value for nothing
)
_ALL_PROTOCOLS: Final = 3  # ETH_P_ALL
_IOFBF: Final = 0
_ERROR_BUFFER_SIZE: Final = 256
_BLOCK_BYTES: Final = 4096
_DIRECTION: Final = re.compile(r"\b(inbound|outbound)\b")

FILE_HEADER_BYTES: Final = 24
RECORD_HEADER_BYTES: Final = 16


class PcapError(Exception):
    """libpcap refused or gave up; the message is libpcap's own."""


class FilterError(PcapError):
    """The filter is not a valid pcap-filter(7) expression for this interface."""


class WriteError(Exception):
    """The capture file can't be written; `errno` says why (ENOSPC, EIO, …)."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


class _Statistics(ctypes.Structure):
    _fields_ = (("received", ctypes.c_uint), ("dropped", ctypes.c_uint), ("interface_dropped", ctypes.c_uint))


def _load() -> ctypes.CDLL:
    for name in ("libpcap.so.0.8", "libpcap.so.1"):  # Debian's name, then everyone else's
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError:
            continue
    raise ImportError("libpcap is not installed: install libpcap0.8 (Debian) or libpcap")


_pcap = _load()
_libc = ctypes.CDLL(None, use_errno=True)

_pointer = ctypes.c_void_p
_int = ctypes.c_int
for _library, _name, _result, _arguments in (
    (_pcap, "pcap_create", _pointer, (ctypes.c_char_p, ctypes.c_char_p)),
    (_pcap, "pcap_set_snaplen", _int, (_pointer, _int)),
    (_pcap, "pcap_set_promisc", _int, (_pointer, _int)),
    (_pcap, "pcap_set_timeout", _int, (_pointer, _int)),
    (_pcap, "pcap_set_buffer_size", _int, (_pointer, _int)),
    (_pcap, "pcap_set_tstamp_precision", _int, (_pointer, _int)),
    (_pcap, "pcap_set_protocol_linux", _int, (_pointer, _int)),
    (_pcap, "pcap_activate", _int, (_pointer,)),
    (_pcap, "pcap_setnonblock", _int, (_pointer, _int, ctypes.c_char_p)),
    (_pcap, "pcap_get_selectable_fd", _int, (_pointer,)),
    (_pcap, "pcap_compile", _int, (_pointer, ctypes.POINTER(_Program), ctypes.c_char_p, _int, ctypes.c_uint32)),
    (_pcap, "pcap_setfilter", _int, (_pointer, ctypes.POINTER(_Program))),
    (_pcap, "pcap_freecode", None, (ctypes.POINTER(_Program),)),
    (_pcap, "pcap_stats", _int, (_pointer, ctypes.POINTER(_Statistics))),
    (_pcap, "pcap_dispatch", _int, (_pointer, _int, _pointer, _pointer)),
    (_pcap, "pcap_geterr", ctypes.c_char_p, (_pointer,)),
    (_pcap, "pcap_statustostr", ctypes.c_char_p, (_int,)),
    (_pcap, "pcap_close", None, (_pointer,)),
    (_pcap, "pcap_dump_fopen", _pointer, (_pointer, _pointer)),
    (_pcap, "pcap_dump_ftell64", ctypes.c_int64, (_pointer,)),
    (_pcap, "pcap_dump_flush", _int, (_pointer,)),
    (_pcap, "pcap_dump_close", None, (_pointer,)),
    (_libc, "fdopen", _pointer, (_int, ctypes.c_char_p)),
    (_libc, "fclose", _int, (_pointer,)),
    (_libc, "setvbuf", _int, (_pointer, _pointer, _int, ctypes.c_size_t)),
    (_libc, "ferror", _int, (_pointer,)),
):
    _function = getattr(_library, _name)
    _function.restype = _result
    _function.argtypes = _arguments

_PCAP_DUMP: Final = ctypes.cast(_pcap.pcap_dump, _pointer)


class Handle:
    """An activated capture on one interface of the calling thread's network namespace.

    The socket stays in that namespace wherever the handle is used later. A handle belongs to one thread at a time.
    """

    def __init__(self, interface: str, *, snap_length: int, ring_bytes: int, timeout_milliseconds: int) -> None:
        """Open `interface`, not promiscuous, with nanosecond timestamps; nothing comes in before `open_gate`.

        `timeout_milliseconds` is how long the kernel may hold a packet back to fill a block of the ring.
        Raises PcapError.
        """
        buffer = ctypes.create_string_buffer(_ERROR_BUFFER_SIZE)
        self._handle: int | None = _pcap.pcap_create(interface.encode(), buffer)
        if not self._handle:
            raise PcapError(_text(buffer.value))
        self._interface = interface
        self.snap_length = snap_length
        self.timeout_milliseconds = timeout_milliseconds
        self._received = _Unwrapped()
        self._dropped = _Unwrapped()
        try:
            for setting, value in (
                ("snaplen", snap_length),
                ("promisc", 0),
                ("timeout", timeout_milliseconds),
                ("buffer_size", ring_bytes),
                ("tstamp_precision", _PRECISION_NANO),
                ("protocol_linux", _NO_PROTOCOL),
            ):
                self._check(getattr(_pcap, f"pcap_set_{setting}")(self._handle, value))
            self._check(_pcap.pcap_activate(self._handle))
            self._check(_pcap.pcap_setnonblock(self._handle, 1, buffer))
            self.descriptor: int = _pcap.pcap_get_selectable_fd(self._handle)
        except BaseException:
            self.close()
            raise

    def set_filter(self, expression: str) -> None:
        """Let only what matches `expression` (pcap-filter(7)) through the gate. Raises FilterError, PcapError.

        Compiled for the live handle: a program compiled without one never sees VLAN tags, which Linux strips.
        """
        if word := _DIRECTION.search(expression):
            raise FilterError(
                f"{word[0]!r} in a filter loses packets: libpcap can't tell it of those it filters itself"
            )
        program = _Program()
        if _pcap.pcap_compile(self._handle, ctypes.byref(program), expression.encode(), 1, _NETMASK_UNKNOWN) < 0:
            raise FilterError(_text(_pcap.pcap_geterr(self._handle)))
        try:
            self._check(_pcap.pcap_setfilter(self._handle, ctypes.byref(program)))
        finally:
            _pcap.pcap_freecode(ctypes.byref(program))

    def open_gate(self, *, loopback: bool = False) -> None:
        """Let packets in from now on, all of which are counted and have passed the filter. Raises PcapError.

        A `loopback` gives each packet twice, on its way out and in, and libpcap writes the latter. So the kernel is told
        to keep the former to itself, else it would count what no file holds.

        libpcap would take in everything from the start, and filter what came before the filter was set by itself: then
        nobody could tell how many of the packets counted will reach the file.
        """
        try:
            with socket.socket(fileno=os.dup(self.descriptor)) as duplicate:
                if loopback:
                    duplicate.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
                duplicate.bind((self._interface, _ALL_PROTOCOLS))
        except OSError as error:
            raise PcapError(f"{self._interface}: {error.strerror}") from error

    def close_gate(self) -> None:
        """Let nothing more into the ring; what is in it can still be dispatched.

        A raw SO_ATTACH_FILTER, because pcap_setfilter would make libpcap throw away what waits in the ring.
        """
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
        program = struct.pack("HP", 1, ctypes.addressof(instruction))
        with socket.socket(fileno=os.dup(self.descriptor)) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def dispatch(self, count: int, dump: "Dump") -> int:
        """Write at most `count` waiting packets to `dump` and return how many; 0 when none waits.

        Raises PcapError when the interface went away. A full disk goes unnoticed here: call `dump.check` after it.
        """
        ctypes.set_errno(0)
        written = int(_pcap.pcap_dispatch(self._handle, count, _PCAP_DUMP, dump.pointer))
        if written < 0:
            raise PcapError(_text(_pcap.pcap_geterr(self._handle)))
        return written

    def statistics(self) -> tuple[int, int]:
        """Packets received into the ring or dropped, and of these the dropped, since the handle was opened.

        libpcap's counters have 32 bits; call this more often than they wrap (at 10 million packets/s: 7 minutes).
        """
        statistics = _Statistics()
        self._check(_pcap.pcap_stats(self._handle, ctypes.byref(statistics)))
        return self._received.update(statistics.received), self._dropped.update(statistics.dropped)

    def close(self) -> None:
        """Give the ring back; takes tens of milliseconds (the kernel waits for its readers)."""
        if self._handle:
            _pcap.pcap_close(self._handle)
            self._handle = None

    def open_dump(self, descriptor: int, buffer: "Buffer", *, copies: int | None = None) -> "Dump":
        """Start a pcap file on `descriptor`, which the dump owns from now on. Raises PcapError, WriteError.

        With `copies`, another descriptor of the same file, a `DirectDump`.
        """
        if copies is not None:
            return DirectDump(self._handle, descriptor, buffer, copies=copies)
        return Dump(self._handle, descriptor, buffer)

    def _check(self, status: int) -> None:
        if status < _SUCCESS:  # positive values are warnings
            detail = _text(_pcap.pcap_geterr(self._handle)) or _text(_pcap.pcap_statustostr(status))
            raise PcapError(detail)


class Buffer:
    """Memory for one file's stdio buffer: glibc ignores setvbuf's size unless the memory comes with it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size)  # on a page's boundary, as O_DIRECT wants it; costs nothing until it is used
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class Dump:
    """A pcap file being written. Between two dispatches it always ends at a record's boundary."""

    def __init__(self, handle: int | None, descriptor: int, buffer: Buffer) -> None:
        self.pointer: int | None = None
        self._buffer = buffer  # must outlive the FILE
        self._file: int | None = _libc.fdopen(descriptor, b"wb")
        if not self._file:
            number = ctypes.get_errno()
            os.close(descriptor)
            raise WriteError(number)
        _libc.setvbuf(self._file, buffer.address, _IOFBF, buffer.size)
        self.pointer = _pcap.pcap_dump_fopen(handle, self._file)
        if not self.pointer:
            detail = _text(_pcap.pcap_geterr(handle))
            _libc.fclose(self._file)
            raise PcapError(detail)

    def tell(self) -> int:
        """Bytes written so far, with those that still wait in the buffer."""
        return int(_pcap.pcap_dump_ftell64(self.pointer))

    def flush(self) -> None:
        """Hand everything to the kernel. Raises WriteError."""
        ctypes.set_errno(0)
        if _pcap.pcap_dump_flush(self.pointer) < 0:
            raise WriteError(ctypes.get_errno() or errno.EIO)
        self.check()

    def check(self) -> None:
        """Raise WriteError if a write failed: pcap_dump returns nothing, only the FILE's error mark tells."""
        if _libc.ferror(self._file):
            raise WriteError(ctypes.get_errno() or errno.EIO)

    def finish(self) -> None:
        """Like `flush`, when no packet will follow."""
        self.flush()

    def close(self) -> None:
        """Write what waits and close. A failure here is silent, so finish first."""
        if self.pointer:
            _pcap.pcap_dump_close(self.pointer)
            self.pointer = None


class DirectDump(Dump):
    """A dump that writes whole buffers past the page cache (O_DIRECT), and yet can be read while it grows.

    A flush in between can't go through the FILE, since then it would not write whole blocks any more. So it copies what
    the FILE holds to the place where the FILE will write the same later.
    """

    def __init__(self, handle: int | None, descriptor: int, buffer: Buffer, *, copies: int) -> None:
        """`copies` is another descriptor of the same file, opened without O_DIRECT; it stays the caller's."""
        super().__init__(handle, descriptor, buffer)
        self._descriptor = descriptor
        self._copies = copies
        self._copied = 0
        _set_direct(descriptor, wanted=True)

    def flush(self) -> None:
        self.check()
        written, end = os.lseek(self._descriptor, 0, os.SEEK_CUR), self.tell()
        start = max(self._copied, written)
        try:
            while start < end:
                start += os.pwrite(self._copies, self._buffer.view[start - written : end - written], start)
        except OSError as error:
            raise WriteError(error.errno or errno.EIO) from error
        self._copied = end

    def finish(self) -> None:
        _set_direct(self._descriptor, wanted=False)  # the last block isn't whole
        super().flush()

    def close(self) -> None:
        if self.pointer:
            _set_direct(self._descriptor, wanted=False)
        super().close()


def can_write_directly(descriptor: int, buffer: Buffer) -> bool:
    """Whether the file system of this empty file takes O_DIRECT, found out by a write. Raises OSError."""
    try:
        _set_direct(descriptor, wanted=True)
        os.pwrite(descriptor, buffer.view[:_BLOCK_BYTES], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        _set_direct(descriptor, wanted=False)
        os.ftruncate(descriptor, 0)
    return True


def _set_direct(descriptor: int, *, wanted: bool) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)


class _Unwrapped:
    """The true count behind a 32-bit counter that wraps."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, value: int) -> int:
        self.total += (value - self.total) % 2**32
        return self.total


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
