"""Filters: what libpcap makes of them, on packets of every kind."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import settings
from pydantic import ValidationError
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, GRE, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from api import bpf
from api.object import explain
from api.packetcapture import MOST_PORTS, Filter, PacketCaptureSpec
from tests.api.compiled import COOKED, ETHERNET, RAW_IP, Compiled

MANY: Final = max(1_000, settings().max_examples)
"""Random filters; --hypothesis-profile=soak makes it 100,000."""

KERNEL_ROOM: Final = 4096
"""Instructions that Linux takes in one program (BPF_MAXINSNS)."""

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def read(filters: Sequence[dict[str, Any]]) -> list[Filter]:
    return PacketCaptureSpec.model_validate({"selector": "all()", "filters": filters}).filters


def compiled(filters: Sequence[dict[str, Any]], *, link_type: int = ETHERNET) -> Compiled:
    return Compiled(bpf.expression(read(filters)), link_type=link_type)


def segment(source: int = 4000, target: int = 80) -> Packet:
    return TCP(sport=source, dport=target)


PACKETS: dict[str, Packet] = {
    "tcp to 80": IP() / segment(),
    "tcp from 80": IP() / segment(80, 4000),
    "tcp to 80, IP options": IP(options=[IPOption_NOP()] * 8) / segment(),
    "tcp6 to 80": IPv6() / segment(),
    "tcp to 8050": IP() / segment(target=8050),
    "udp to 80": IP() / UDP(sport=4000, dport=80),
    "udp6 to 53": IPv6() / UDP(sport=4000, dport=53),
    "sctp to 80": IP() / SCTP(sport=4000, dport=80),
    "ping": IP() / ICMP(),
    "pong": IP() / ICMP(type=0),
    "too large": IP() / ICMP(type=3, code=4),
    "ping6": IPv6() / ICMPv6EchoRequest(),
    "too large6": IPv6() / ICMPv6PacketTooBig(),
    "unreachable6": IPv6() / ICMPv6DestUnreach(code=4),
    "udplite": IP(proto=136) / bytes(8),
    "gre": IP(proto=47) / bytes(8),
    # the first has the ports, the others bytes that look like them
    "first fragment": IP(flags="MF") / segment() / bytes(12),
    "later fragment": IP(frag=4, proto=6) / segment() / bytes(12),
    "later fragment of a ping": IP(frag=4, proto=1) / ICMP(),
    "first fragment6": IPv6() / IPv6ExtHdrFragment(m=1) / segment(),
    "later fragment6": IPv6() / IPv6ExtHdrFragment(offset=4, nh=6) / segment(),
    "tcp6 behind options": IPv6() / IPv6ExtHdrHopByHop() / segment(),
    "tcp in IP in IP": IP() / IP() / segment(),
    "tcp in IPv6 in IP": IP() / IPv6() / segment(),
    "tcp in GRE": IP() / GRE() / IP() / segment(),
    "tcp in VXLAN": IP() / UDP(sport=4000, dport=4789) / VXLAN() / ETHER / IP() / segment(),
    "tcp in a VLAN": Dot1Q(vlan=7) / IP() / segment(),
    "arp": ARP(),
}

TO_80 = {"tcp to 80", "tcp from 80", "tcp to 80, IP options", "tcp6 to 80", "first fragment"}
TCP_ALL = {*TO_80, "tcp to 8050", "later fragment", "first fragment6", "later fragment6"}

CASES: list[tuple[list[dict[str, Any]], set[str]]] = [
    ([], set(PACKETS)),
    ([{}], set(PACKETS)),
    ([{"protocol": "TCP"}, {}], set(PACKETS)),
    ([{"protocol": "TCP"}], TCP_ALL),
    ([{"protocol": "tcp"}, {"protocol": "TCP", "ports": [53]}], TCP_ALL),
    ([{"protocol": "tcp", "ports": [80]}], TO_80),
    ([{"protocol": 6, "ports": ["80"]}], TO_80),
    ([{"protocol": "6", "ports": ["80:80"]}], TO_80),
    ([{"protocol": "TCP", "ports": [80, "8000:8100"]}], TO_80 | {"tcp to 8050"}),
    ([{"protocol": "TCP", "ports": ["4000:4000"]}], TO_80 | {"tcp to 8050"}),
    ([{"ports": [80]}], TO_80 | {"udp to 80", "sctp to 80"}),
    ([{"ports": [53]}], {"udp6 to 53"}),
    (
        [{"ports": ["1:65535"]}, {"protocol": "TCP"}],
        TCP_ALL | {"udp to 80", "udp6 to 53", "sctp to 80", "tcp in VXLAN"},
    ),
    ([{"protocol": "UDP"}], {"udp to 80", "udp6 to 53", "tcp in VXLAN"}),
    ([{"protocol": "UDP", "ports": [4789]}], {"tcp in VXLAN"}),
    ([{"protocol": "SCTP", "ports": [80]}], {"sctp to 80"}),
    ([{"protocol": "ICMP"}], {"ping", "pong", "too large", "later fragment of a ping"}),
    ([{"protocol": "ICMP", "icmp": {"type": "Echo-Request"}}], {"ping"}),
    ([{"protocol": 1, "icmp": {"type": "0"}}], {"pong"}),
    ([{"protocol": "ICMP", "icmp": {"type": "destination-unreachable", "code": 4}}], {"too large"}),
    ([{"protocol": "ICMP", "icmp": {"type": 3, "code": 3}}], set()),
    (
        [{"protocol": "ICMP", "icmp": {"type": 8}}, {"protocol": "ICMP", "icmp": {"type": 0, "code": 0}}],
        {"ping", "pong"},
    ),
    ([{"protocol": "ICMPv6"}], {"ping6", "too large6", "unreachable6"}),
    ([{"protocol": "ICMPv6", "icmp": {"type": "packet-too-big"}}], {"too large6"}),
    ([{"protocol": "icmpv6", "icmp": {"type": "destination-unreachable", "code": 4}}], {"unreachable6"}),
    ([{"protocol": 58, "icmp": {"type": 128}}], {"ping6"}),
    ([{"protocol": "UDPLite"}], {"udplite"}),
    ([{"protocol": 47}], {"gre", "tcp in GRE"}),
    ([{"protocol": 4}], {"tcp in IP in IP"}),
    ([{"protocol": 41}], {"tcp in IPv6 in IP"}),
    ([{"protocol": 44}], {"first fragment6", "later fragment6"}),
    (
        [{"protocol": "ICMP"}, {"protocol": "UDP", "ports": [53]}],
        {"ping", "pong", "too large", "later fragment of a ping", "udp6 to 53"},
    ),
]


@pytest.mark.parametrize(("filters", "matching"), CASES)
def test_libpcap_lets_through_what_the_filters_mean(filters: list[dict[str, Any]], matching: set[str]) -> None:
    with compiled(filters) as program:
        assert {name for name, packet in PACKETS.items() if program.lets_through(bytes(ETHER / packet))} == matching


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"icmp": {"type": 8}}, "icmp needs protocol ICMP or ICMPv6"),
        ({"protocol": "TCP", "icmp": {"type": 8}}, "icmp needs protocol ICMP or ICMPv6"),
        (
            {"protocol": "ICMP", "icmp": {"type": "packet-too-big"}},
            "protocol ICMP has no packet-too-big: give a number, or destination-unreachable, echo-reply, echo-request, "
            "parameter-problem, redirect, router-advertisement, router-solicitation, time-exceeded",
        ),
        (
            {"protocol": "ICMP", "icmp": {"type": 256}},
            "icmp.type: 256 is no kind of ICMP messages: give a number from 0 to 255, or destination-unreachable, "
            "echo-reply, echo-request, neighbor-advertisement, neighbor-solicitation, packet-too-big, "
            "parameter-problem, redirect, router-advertisement, router-solicitation, time-exceeded",
        ),
        (
            {"protocol": "ICMP", "icmp": {"type": 8, "code": 256}},
            "icmp.code: Input should be less than or equal to 255",
        ),
        ({"protocol": "ICMP", "icmp": {}}, "icmp.type: Field required"),
    ],
)
def test_kinds_of_messages_that_do_not_fit_are_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Filter.model_validate(entry)
    assert explain(refusal.value) == words


@pytest.mark.parametrize(
    "text", ["8 or net 0.0.0.0/0", "echo-request]", "8\n", "0x8", "٨", "-1", " 8", "", "icmp-echo"]
)
def test_no_words_of_a_users_pass_for_a_kind_of_messages(text: str) -> None:
    with pytest.raises(ValidationError, match="is no kind of ICMP messages"):
        Filter.model_validate({"protocol": "ICMP", "icmp": {"type": text}})


@dataclass(frozen=True)
class Sample:
    """A packet, and what a filter can know of it."""

    frame: bytes
    protocols: frozenset[int] = frozenset()
    ports: frozenset[int] = frozenset()
    message: tuple[int, int] | None = None


PORTS = (1, 53, 79, 80, 81, 443, 8080, 65535)
NUMBERS = (1, 6, 17, 44, 47, 58, 132, 136, 255)


def samples() -> Iterator[Sample]:
    """Packets of each kind with ports and messages of all sorts."""

    def sample(packet: Packet, *protocols: int, ports: Sequence[int] = (), message: Any = None) -> Sample:
        return Sample(bytes(ETHER / packet), frozenset(protocols), frozenset(ports), message)

    options = [IPOption_NOP()] * 4
    for source, target in itertools.product(PORTS, PORTS):
        transports = {
            6: TCP(sport=source, dport=target),
            17: UDP(sport=source, dport=target),
            132: SCTP(sport=source, dport=target),
        }
        number, transport = random.Random(source * 65536 + target).choice([*transports.items()])  # noqa: S311
        both = (source, target)
        yield sample(IP() / transport, number, ports=both)
        yield sample(IP(options=options) / transport, number, ports=both)
        yield sample(IP(flags="MF") / transport, number, ports=both)
        yield sample(IP(frag=9, proto=number) / transport, number)
        yield sample(IPv6() / transport, number, ports=both)
        yield sample(IPv6() / IPv6ExtHdrFragment(m=1) / transport, 44, number)
        yield sample(IPv6() / IPv6ExtHdrHopByHop() / transport, 0)
        yield sample(IP() / IP() / transport, 4)
        yield sample(Dot1Q(vlan=1) / IP() / transport)
    for kind, code in itertools.product((0, 1, 3, 8, 58, 128, 255), (0, 4, 255)):
        message = Raw(bytes((kind, code, 0, 0)) + bytes(8))
        yield sample(IP(proto=1) / message, 1, message=(kind, code))
        yield sample(IP(options=options, proto=1) / message, 1, message=(kind, code))
        yield sample(IP(frag=9, proto=1) / message, 1)
        yield sample(IPv6(nh=58) / message, 58, message=(kind, code))
        yield sample(IPv6() / IPv6ExtHdrFragment(nh=58) / message, 44, 58)
    for number in NUMBERS:
        packet = IP(proto=number) / Raw(bytes(40))
        zero = (0,) if number in (6, 17, 132) else ()
        yield sample(packet, number, ports=zero, message=(0, 0) if number == 1 else None)
    yield sample(ARP())


@pytest.fixture(scope="module")
def pool() -> list[Sample]:
    return [*samples()]


def any_ports(dice: random.Random) -> int | str:
    low, high = sorted(dice.choices((*PORTS, dice.randrange(1, 65536)), k=2))
    return dice.choice((low, str(low), f"{low}:{high}"))


def any_filter(dice: random.Random) -> dict[str, Any]:
    protocol = dice.choice(
        (None, "TCP", "udp", "SCTP", "ICMP", "icmpv6", "UDPLite", *NUMBERS, str(dice.choice(NUMBERS)))
    )
    entry: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
    number = NAMES.get(str(protocol).lower(), protocol)
    if str(number) in ("None", "6", "17", "132") and dice.random() < 0.9:
        entry["ports"] = [any_ports(dice) for _ in range(dice.randrange(1, 5))]
    if str(number) in ("1", "58") and dice.random() < 0.7:
        entry["icmp"] = {"type": dice.choice((0, 3, "8", 128, 58, "echo-request", "destination-unreachable"))}
        if dice.random() < 0.5:
            entry["icmp"]["code"] = dice.choice((0, 4))
    return entry


NAMES = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "icmpv6": 58, "udplite": 136}
MESSAGES = {(1, "echo-request"): 8, (1, "destination-unreachable"): 3}
MESSAGES |= {(58, "echo-request"): 128, (58, "destination-unreachable"): 1}


def means(entry: dict[str, Any], sample: Sample) -> bool:
    """One entry and one packet, as a person reads them."""
    number = None
    if "protocol" in entry:
        number = int(NAMES.get(str(entry["protocol"]).lower(), entry["protocol"]))
        if number not in sample.protocols:
            return False
    if "icmp" in entry:
        wanted = entry["icmp"]["type"]
        kind, code = MESSAGES.get((number or 0, str(wanted)), wanted), entry["icmp"].get("code")
        if sample.message is None or sample.message[0] != int(kind) or code not in (None, sample.message[1]):
            return False
    for ports in entry.get("ports", ()):
        low, _, high = str(ports).partition(":")
        if any(int(low) <= port <= int(high or low) for port in sample.ports):
            return True
    return "ports" not in entry


def plain(entry: dict[str, Any]) -> str:
    """One entry in libpcap's own words."""
    words = ["len >= 0"]
    number = NAMES.get(str(entry.get("protocol")).lower(), entry.get("protocol"))
    if number is not None:
        words.append(f"(ip proto {number} or ip6 proto {number})")
    if "ports" in entry:
        words.append(f"({' or '.join('portrange ' + str(each).replace(':', '-') for each in entry['ports'])})")
    return f"({' and '.join(words)})"


def test_random_filters_let_through_what_they_mean_and_what_libpcaps_own_words_do(pool: list[Sample]) -> None:
    for seed in range(MANY):
        dice = random.Random(seed)  # noqa: S311 - the same filters every time
        filters = [any_filter(dice) for _ in range(dice.choice((1, 1, 2, 3, 5)))]
        some = dice.sample(pool, 60)
        with compiled(filters) as program:
            through = [program.lets_through(sample.frame) for sample in some]
        assert through == [any(means(entry, sample) for entry in filters) for sample in some], (seed, filters)
        if not any("icmp" in entry for entry in filters):
            with Compiled(" or ".join(map(plain, filters))) as program:
                assert through == [program.lets_through(sample.frame) for sample in some], (seed, filters)


def largest(groups: Sequence[str | None], *, each: int, width: int) -> list[dict[str, Any]]:
    """As many ranges as a capture may have, none of which can be merged with another."""
    filters: list[dict[str, Any]] = []
    distance = 65535 // (each + 1)
    for shift, protocol in enumerate(groups):
        starts = [1 + shift % 7 + position * distance for position in range(each)]
        entry: dict[str, Any] = {"ports": [f"{start}:{start + width}" for start in starts]}
        filters.append(entry if protocol is None else entry | {"protocol": protocol})
    return filters


LARGEST = {
    "any protocol": [
        {"ports": [f"{1 + number * 250}:{1 + number * 250 + 99}" for number in range(start, start + 64)]}
        for start in range(0, 256, 64)
    ],
    "single ports": [{"ports": [*range(start, start + 128, 2)]} for start in (1, 301, 60001, 65001)],
    "each protocol its own": largest([None, "TCP", "UDP", "SCTP"], each=64, width=500),
    "short lists": largest(["TCP", "UDP", "SCTP", None] * 8, each=8, width=3),
    "protocols beside": [
        *largest([None, "TCP", "UDP", "SCTP"], each=64, width=9),
        *({"protocol": "ICMPv6", "icmp": {"type": number, "code": number}} for number in range(14)),
        *({"protocol": number} for number in range(200, 214)),
    ],
}


@pytest.mark.parametrize(
    ("shape", "link_type"),
    [*((shape, ETHERNET) for shape in LARGEST), ("short lists", RAW_IP), ("short lists", COOKED)],
)
def test_the_largest_filters_are_compiled_and_the_kernel_has_room_for_them(shape: str, link_type: int) -> None:
    """So what admission accepts never fails on a node."""
    assert sum(len(entry.get("ports", ())) for entry in LARGEST[shape]) == MOST_PORTS
    with compiled(LARGEST[shape], link_type=link_type) as program:
        assert program.instructions <= KERNEL_ROOM


def test_ports_that_touch_are_one_range() -> None:
    apart = read([{"protocol": "TCP", "ports": [80, "81:90", "85:100", 102]}, {"protocol": 6, "ports": [101]}])
    assert bpf.expression(apart) == bpf.expression(read([{"protocol": "tcp", "ports": ["80:102"]}]))
