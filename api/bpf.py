"""Filters as libpcap reads them (pcap-filter(7)).

The expression is made of numbers and words of ours only: no text of a user's gets into it. Standard library only.
"""

from collections.abc import Sequence
from typing import Protocol

WITH_PORTS = ("TCP", "UDP", "SCTP")
"""Protocols whose ports libpcap can tell."""

_PRIMITIVES = {
    "TCP": "tcp",
    "UDP": "udp",
    "SCTP": "sctp",
    "ICMP": "icmp",
    "ICMPv6": "icmp6",
    "UDPLite": "(ip proto 136 or ip6 proto 136)",
}


class FilterLike(Protocol):
    """One entry of `spec.filters`, read and checked."""

    @property
    def protocol(self) -> str | int | None: ...

    @property
    def ports(self) -> Sequence[tuple[int, int]]: ...


def expression(filters: Sequence[FilterLike]) -> str:
    """What libpcap shall compile: entries ORed, protocol and ports of one entry ANDed; no filter lets all through."""
    return " or ".join(f"({_entry(entry)})" for entry in filters)


def _entry(entry: FilterLike) -> str:
    parts = []
    if isinstance(entry.protocol, int):
        parts.append(f"(ip proto {entry.protocol} or ip6 proto {entry.protocol})")
    elif entry.protocol is not None:
        parts.append(_PRIMITIVES[entry.protocol])
    if entry.ports:
        ports = " or ".join(f"port {low}" if low == high else f"portrange {low}-{high}" for low, high in entry.ports)
        parts.append(f"({ports})")
    return " and ".join(parts) or "len >= 0"
