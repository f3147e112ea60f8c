"""What the kernel tells of links and addresses (rtnetlink(7)), of the network namespace in which a socket was opened.

Such a socket goes on telling of that namespace wherever it is used later, and keeps the namespace alive.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self

Address = IPv4Address | IPv6Address

_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22
_RTMGRP_LINK: Final = 1
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x1
_NLM_F_DUMP: Final = 0x300
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFLA_IFNAME: Final = 3
_IFLA_STATS64: Final = 23
_IFF_UP: Final = 0x1
_IFF_LOOPBACK: Final = 0x8
_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_COUNTERS: Final = struct.Struct("=QQ")  # the first two of struct rtnl_link_stats64: rx_packets, tx_packets
_RECEIVE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `packets` went in and out since it was made, by its own counters.

    A loopback counts each packet on both ways, and a capture sees it once: so does this.
    """

    index: int
    name: str
    up: bool
    loopback: bool
    packets: int

    @property
    def label(self) -> str:
        return label(self.name)


class Links:
    """The links of the calling thread's network namespace, and word of their changes."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._requests = _open()
        try:
            self._changes = _open()
        except OSError:
            self._requests.close()
            raise
        self._changes.bind((0, _RTMGRP_LINK))
        self._changes.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._requests.close()
        self._changes.close()

    def fileno(self) -> int:
        """Readable when something changed since the last `clear`."""
        return self._changes.fileno()

    def clear(self) -> None:
        """Take note of all changes. Raises OSError."""
        while True:
            try:
                self._changes.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # some were lost; that there were any is all that matters
                    raise

    def present(self) -> list[Link]:
        """Raises OSError."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        return [_link(answer) for answer in _dump(self._requests, _RTM_GETLINK, body)]


def label(name: str) -> str:
    """The name as it may be written anywhere: the kernel lets it be any bytes but `/`, white space and NUL."""
    return os.fsencode(name).decode(errors="backslashreplace")


def local_addresses() -> set[Address]:
    """The addresses of the calling thread's network namespace. Raises OSError."""
    found = set()
    with _open() as channel:
        for body in _dump(channel, _RTM_GETADDR, struct.pack("=BBBBi", socket.AF_UNSPEC, 0, 0, 0, 0)):
            attributes = dict(_attributes(body[8:]))
            # On a point-to-point link IFA_ADDRESS is the other end, and IFA_LOCAL ours.
            raw = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if raw:
                found.add(ip_address(raw))
    return found


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def _dump(channel: socket.socket, kind: int, body: bytes) -> Iterator[bytes]:
    """The bodies of all messages that answer a dump request (netlink(7)). Raises OSError."""
    channel.send(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
    while True:
        for received, content in _messages(channel.recv(_RECEIVE_BYTES)):
            if received == _NLMSG_DONE:
                return
            if received == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", content)[0]
                raise OSError(number, f"netlink: {os.strerror(number)}")
            yield content


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    attributes = dict(_attributes(body[_LINK.size :]))
    received, sent = _COUNTERS.unpack_from(attributes[_IFLA_STATS64])
    loopback = bool(flags & _IFF_LOOPBACK)
    return Link(
        index=index,
        name=os.fsdecode(attributes[_IFLA_IFNAME].rstrip(b"\0")),
        up=bool(flags & _IFF_UP),
        loopback=loopback,
        packets=received if loopback else received + sent,
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind, data[4:length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
