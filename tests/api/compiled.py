"""libpcap's own compiler, and its interpreter of what it made: which packets a filter lets through."""

import ctypes
from typing import Final, Self

ETHERNET: Final = 1
RAW_IP: Final = 12
COOKED: Final = 113
"""Link types (pcap-linktype(7)): of most interfaces, of tunnels, and of interfaces that have none of their own."""

_SNAP_LENGTH: Final = 262144
_NETMASK_UNKNOWN: Final = 0xFFFFFFFF


class _Program(ctypes.Structure):
    length: int
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


class _Header(ctypes.Structure):
    _fields_ = (("time", ctypes.c_long * 2), ("captured", ctypes.c_uint32), ("length", ctypes.c_uint32))


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL("libpcap.so.0.8")  # Debian's name, which the images have too
    library.pcap_open_dead.restype = ctypes.c_void_p
    library.pcap_geterr.restype = ctypes.c_char_p
    library.pcap_geterr.argtypes = (ctypes.c_void_p,)
    library.pcap_close.argtypes = (ctypes.c_void_p,)
    library.pcap_compile.argtypes = (
        *(ctypes.c_void_p, ctypes.POINTER(_Program), ctypes.c_char_p, ctypes.c_int, ctypes.c_uint32),
    )
    return library


_pcap = _load()


class Compiled:
    """A filter's program. Raises `ValueError` when libpcap refuses the expression."""

    def __init__(self, expression: str, *, link_type: int = ETHERNET) -> None:
        self._program = _Program()
        handle = _pcap.pcap_open_dead(link_type, _SNAP_LENGTH)
        try:
            status = _pcap.pcap_compile(handle, ctypes.byref(self._program), expression.encode(), 1, _NETMASK_UNKNOWN)
            if status < 0:
                raise ValueError(_pcap.pcap_geterr(handle).decode())
        finally:
            _pcap.pcap_close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _pcap.pcap_freecode(ctypes.byref(self._program))

    @property
    def instructions(self) -> int:
        return self._program.length

    def lets_through(self, frame: bytes) -> bool:
        header = _Header(captured=len(frame), length=len(frame))
        return bool(_pcap.pcap_offline_filter(ctypes.byref(self._program), ctypes.byref(header), frame))
