"""Filters as libpcap reads them (pcap-filter(7)).

The expression is made of numbers and words of ours only: no text of a user's gets into it. It means what libpcap's own
`proto`, `port`, `portrange` and `icmptype` mean, but is written so that libpcap compiles hundreds of ranges in a moment
and the kernel takes them: those words, chained, take minutes and more instructions than the kernel has room for.

As with those words, only the outermost IP header counts, and what it does not tell is not matched: the ports of later
fragments, of all IPv6 fragments and behind IPv6 extension headers, and whatever is inside a tunnel. Linux takes the
outer VLAN tag off a packet before the filter sees it; one with a second tag is not matched. Standard library only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

PROTOCOLS: Final[Mapping[str, int]] = {"TCP": 6, "UDP": 17, "ICMP": 1, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
"""Numbers of the protocols that can be named (IANA, Protocol Numbers)."""

WITH_PORTS: Final = ("TCP", "UDP", "SCTP")
"""Protocols whose ports libpcap can tell."""

ICMP_TYPES: Final[Mapping[int, Mapping[str, int]]] = {
    PROTOCOLS["ICMP"]: {
        "echo-reply": 0,
        "destination-unreachable": 3,
        "redirect": 5,
        "echo-request": 8,
        "router-advertisement": 9,
        "router-solicitation": 10,
        "time-exceeded": 11,
        "parameter-problem": 12,
    },
    PROTOCOLS["ICMPv6"]: {
        "destination-unreachable": 1,
        "packet-too-big": 2,
        "time-exceeded": 3,
        "parameter-problem": 4,
        "echo-request": 128,
        "echo-reply": 129,
        "router-solicitation": 133,
        "router-advertisement": 134,
        "neighbor-solicitation": 135,
        "neighbor-advertisement": 136,
        "redirect": 137,
    },
}
"""Kinds of messages that can be named, by protocol (RFC 792, RFC 1256, RFC 4443, RFC 4861)."""

_EVERYTHING: Final = "len >= 0"
_FIRST_FRAGMENT: Final = "ip[6:2] & 0x1fff = 0"
_BEHIND_IP: Final = "(ip[0] & 0xf) << 2"
_BEHIND_IP6: Final = 40

_Ports = tuple[int, int]


class ICMPLike(Protocol):
    """Kinds of ICMP messages, read and checked."""

    @property
    def type(self) -> str | int: ...

    @property
    def code(self) -> int | None: ...


class FilterLike(Protocol):
    """One entry of `spec.filters`, read and checked."""

    @property
    def protocol(self) -> str | int | None: ...

    @property
    def ports(self) -> Sequence[_Ports]: ...

    @property
    def icmp(self) -> ICMPLike | None: ...


def number(protocol: str | int) -> int:
    """The number of a protocol, by one of its names in `PROTOCOLS` or by itself."""
    return PROTOCOLS[protocol] if isinstance(protocol, str) else protocol


def expression(filters: Sequence[FilterLike]) -> str:
    """What libpcap shall compile: entries ORed, what one entry says ANDed; no filter lets all through."""
    whole: set[int] = set()
    ports: dict[tuple[int, ...], list[_Ports]] = {}
    messages: set[tuple[int, int, int | None]] = set()
    for entry in filters:
        if entry.ports:
            named = tuple(map(number, WITH_PORTS if entry.protocol is None else [entry.protocol]))
            ports.setdefault(named, []).extend(entry.ports)
        elif entry.protocol is None:
            return _EVERYTHING
        elif entry.icmp is not None:
            protocol = number(entry.protocol)
            kind = entry.icmp.type
            messages.add((protocol, ICMP_TYPES[protocol][kind] if isinstance(kind, str) else kind, entry.icmp.code))
        else:
            whole.add(number(entry.protocol))
    return " or ".join(
        [
            *(f"ip proto {each} or ip6 proto {each}" for each in sorted(whole)),
            *(_with_ports(named, _merged(several)) for named, several in ports.items()),
            *(_icmp(*each) for each in sorted(messages, key=str)),
        ]
    )


def _icmp(protocol: int, kind: int, code: int | None) -> str:
    if protocol == PROTOCOLS["ICMP"]:
        head, start = f"ip proto {protocol} and {_FIRST_FRAGMENT}", f"ip[{_BEHIND_IP}"
    else:
        head, start = f"ip6[6] = {protocol}", f"ip6[{_BEHIND_IP6}"
    return f"({head} and {start}] = {kind})" if code is None else f"({head} and {start} : 2] = {kind << 8 | code})"


def _with_ports(protocols: Sequence[int], ports: Sequence[_Ports]) -> str:
    four = _any(f"ip proto {each}" for each in protocols)
    six = _any(f"ip6[6] = {each}" for each in protocols)
    ends4 = _any(_among(f"ip[{start} : 2]", ports) for start in (_BEHIND_IP, f"({_BEHIND_IP}) + 2"))
    ends6 = _any(_among(f"ip6[{_BEHIND_IP6 + offset} : 2]", ports) for offset in (0, 2))
    return f"({four} and {_FIRST_FRAGMENT} and {ends4}) or ({six} and {ends6})"


def _among(port: str, ports: Sequence[_Ports]) -> str:
    """Halved again and again: libpcap's time grows with the cube of a chain's length, and a tree has short chains."""
    if len(ports) == 1:
        ((low, high),) = ports
        return f"{port} = {low}" if low == high else f"({port} >= {low} and {port} <= {high})"
    middle = len(ports) // 2
    bound = ports[middle][0]
    upper, lower = _among(port, ports[middle:]), _among(port, ports[:middle])
    return f"(({port} >= {bound} and {upper}) or ({port} < {bound} and {lower}))"


def _merged(ports: Iterable[_Ports]) -> list[_Ports]:
    """The same ports in as few ranges as there can be, from low to high."""
    merged: list[_Ports] = []
    for low, high in sorted(ports):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged


def _any(alternatives: Iterable[str]) -> str:
    return f"({' or '.join(alternatives)})"
