"""libpcap by ctypes: only what a capture to files needs, and nothing that runs per packet.

`Handle.dispatch` hands packets to libpcap's own `pcap_dump`, so the way from the kernel's ring to the file is C from
end to end, with the GIL released. The functions are those of pcap(3PCAP) in libpcap 1.10, on Linux.
"""

import ctypes
import fcntl
import os
import re
import socket
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Self

_SUCCESS: Final = 0
_NETMASK_UNKNOWN: Final = 0xFFFFFFFF
_PRECISION_NANO: Final = 1
_SO_ATTACH_FILTER: Final = 26
_SO_GET_FILTER: Final = 26
_INSTRUCTION_BYTES: Final = 8  # struct bpf_insn
_SOL_PACKET: Final = 263
_PACKET_IGNORE_OUTGOING: Final = 23
_NO_PROTOCOL: Final = (
    0xFF  # below 0x600 the field of an Ethernet frame is a length, and Linux uses this value for nothing
)
_ALL_PROTOCOLS: Final = 3  # ETH_P_ALL
_ERROR_BUFFER_SIZE: Final = 256
_ADDRESS: Final = struct.Struct("=HHi12x")  # struct sockaddr_ll
_REQUEST: Final = struct.Struct("=16si20x")  # struct ifreq
_SIOCGIFINDEX: Final = 0x8933
_DIRECTION: Final = re.compile(r"\b(inbound|outbound)\b")

FILE_HEADER_BYTES: Final = 24
RECORD_HEADER_BYTES: Final = 16


class PcapError(Exception):
    """libpcap refused or gave up; the message is libpcap's own."""


class FilterError(PcapError):
    """The filter is not a valid pcap-filter(7) expression for this interface."""


class _Program(ctypes.Structure):
    length: int
    instructions: int
    _memory: "ctypes.Array[ctypes.c_char]"
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))

    def copy(self) -> Self:
        """One whose instructions live as long as itself."""
        program = type(self)(self.length)
        program._memory = ctypes.create_string_buffer(
            ctypes.string_at(self.instructions, self.length * _INSTRUCTION_BYTES)
        )
        program.instructions = ctypes.addressof(program._memory)
        return program


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
for _name, _result, _arguments in (
    ("pcap_create", _pointer, (ctypes.c_char_p, ctypes.c_char_p)),
    ("pcap_set_snaplen", _int, (_pointer, _int)),
    ("pcap_set_promisc", _int, (_pointer, _int)),
    ("pcap_set_timeout", _int, (_pointer, _int)),
    ("pcap_set_buffer_size", _int, (_pointer, _int)),
    ("pcap_set_tstamp_precision", _int, (_pointer, _int)),
    ("pcap_set_protocol_linux", _int, (_pointer, _int)),
    ("pcap_activate", _int, (_pointer,)),
    ("pcap_setnonblock", _int, (_pointer, _int, ctypes.c_char_p)),
    ("pcap_get_selectable_fd", _int, (_pointer,)),
    ("pcap_compile", _int, (_pointer, ctypes.POINTER(_Program), ctypes.c_char_p, _int, ctypes.c_uint32)),
    ("pcap_datalink", _int, (_pointer,)),
    ("pcap_setfilter", _int, (_pointer, ctypes.POINTER(_Program))),
    ("pcap_freecode", None, (ctypes.POINTER(_Program),)),
    ("pcap_stats", _int, (_pointer, ctypes.POINTER(_Statistics))),
    ("pcap_dispatch", _int, (_pointer, _int, _pointer, _pointer)),
    ("pcap_geterr", ctypes.c_char_p, (_pointer,)),
    ("pcap_statustostr", ctypes.c_char_p, (_int,)),
    ("pcap_close", None, (_pointer,)),
    ("pcap_dump_fopen", _pointer, (_pointer, _pointer)),
):
    _function = getattr(_pcap, _name)
    _function.restype = _result
    _function.argtypes = _arguments

_PCAP_DUMP: Final = ctypes.cast(_pcap.pcap_dump, _pointer)


class Programs:
    """Compiled filters: hundreds of ports take libpcap seconds, and a filter serves many pods."""

    def __init__(self, most: int = 64) -> None:
        """Keep the `most` that were asked for last."""
        self.compilations = 0
        self._most = most
        self._programs: OrderedDict[_Key, _Program] = OrderedDict()
        self._compiling: dict[_Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: "_Key", compiled: Callable[[], _Program]) -> _Program:
        """The program for these, by `compiled` if need be, for which others with the same key wait. Raises as it."""
        with self._lock:
            turn = self._compiling.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                program = self._programs.get(key)
            if program is None:
                try:
                    program = compiled()
                except BaseException:
                    with self._lock:
                        self._compiling.pop(key, None)
                    raise
            with self._lock:
                self.compilations += key not in self._programs
                self._programs[key] = program
                self._programs.move_to_end(key)
                if len(self._programs) > self._most:
                    oldest, _ = self._programs.popitem(last=False)
                    self._compiling.pop(oldest, None)
        return program


_Key = tuple[int, int, str]
"""Link type, snap length, pcap-filter(7) expression."""

programs: Final = Programs()


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
        self._interface = os.fsencode(interface)
        self._handle: int | None = _pcap.pcap_create(self._interface, buffer)
        if not self._handle:
            raise PcapError(_text(buffer.value))
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

        Compiled for a live handle: a program compiled without one never sees VLAN tags, which Linux strips.
        """
        if word := _DIRECTION.search(expression):
            raise FilterError(
                f"{word[0]!r} in a filter loses packets: libpcap can't tell it of those it filters itself"
            )
        program = programs.get(
            (_pcap.pcap_datalink(self._handle), self.snap_length, expression), lambda: self._compile(expression)
        )
        self._check(_pcap.pcap_setfilter(self._handle, ctypes.byref(program)))
        if not self._kernel_filters():
            raise FilterError(
                f"the kernel does not take a filter of {program.length} instructions: name fewer ports and addresses"
            )

    def _compile(self, expression: str) -> _Program:
        compiled = _Program()
        if _pcap.pcap_compile(self._handle, ctypes.byref(compiled), expression.encode(), 1, _NETMASK_UNKNOWN) < 0:
            raise FilterError(_text(_pcap.pcap_geterr(self._handle)))
        try:
            return compiled.copy()
        finally:
            _pcap.pcap_freecode(ctypes.byref(compiled))

    def _kernel_filters(self) -> bool:
        """Whether the socket has a filter. When the kernel refuses one, libpcap filters by itself and says nothing.

        Then nobody could tell what was dropped from what did not match. Raises OSError.
        """
        count = ctypes.c_uint(0)  # of instructions; none is to be copied
        if _libc.getsockopt(self.descriptor, socket.SOL_SOCKET, _SO_GET_FILTER, None, ctypes.byref(count)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return count.value > 0

    def open_gate(self, *, loopback: bool = False) -> None:
        """Let packets in from now on, all of which are counted and have passed the filter. Raises PcapError.

        A `loopback` gives each packet twice, on its way out and in, and libpcap writes the latter. So the kernel is
        told to keep the former to itself, else it would count what no file holds.

        libpcap would take in everything from the start, and filter what came before the filter was set by itself: then
        nobody could tell how many of the packets counted will reach the file.
        """
        try:
            if loopback:
                with socket.socket(fileno=os.dup(self.descriptor)) as duplicate:
                    duplicate.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            self._bind()
        except OSError as error:
            raise PcapError(error.strerror) from error

    def _bind(self) -> None:
        """As socket.bind does, which takes no name but one in UTF-8 (packet(7), netdevice(7)). Raises OSError."""
        answer = fcntl.ioctl(self.descriptor, _SIOCGIFINDEX, _REQUEST.pack(self._interface, 0))
        _, index = _REQUEST.unpack(answer)
        address = _ADDRESS.pack(socket.AF_PACKET, socket.htons(_ALL_PROTOCOLS), index)
        if _libc.bind(self.descriptor, address, len(address)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def close_gate(self) -> None:
        """Let nothing more into the ring; what is in it can still be dispatched.

        A raw SO_ATTACH_FILTER, because pcap_setfilter would make libpcap throw away what waits in the ring.
        """
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
        program = struct.pack("HP", 1, ctypes.addressof(instruction))
        with socket.socket(fileno=os.dup(self.descriptor)) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def dispatch(self, count: int, dump: int) -> int:
        """Write at most `count` waiting packets to what `dump_to` gave and return how many; 0 when none waits.

        Raises PcapError when the interface went away. A stream that can't be written goes unnoticed here.
        """
        written = int(_pcap.pcap_dispatch(self._handle, count, _PCAP_DUMP, dump))
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

    def dump_to(self, stream: int) -> int:
        """Begin a pcap file on a C stream (`FILE *`): what `dispatch` writes to. Raises PcapError."""
        pointer: int | None = _pcap.pcap_dump_fopen(self._handle, stream)
        if not pointer:
            raise PcapError(_text(_pcap.pcap_geterr(self._handle)))
        return pointer

    def _check(self, status: int) -> None:
        if status < _SUCCESS:  # positive values are warnings
            detail = _text(_pcap.pcap_geterr(self._handle)) or _text(_pcap.pcap_statustostr(status))
            raise PcapError(detail)


class _Unwrapped:
    """The true count behind a 32-bit counter that wraps."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, value: int) -> int:
        self.total += (value - self.total) % 2**32
        return self.total


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
