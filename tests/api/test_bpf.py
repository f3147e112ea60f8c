"""Filters: the expression, and what libpcap makes of it on real packets."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet
from scapy.utils import wrpcap

from api import bpf
from api.packetcapture import Filter

PACKETS: dict[str, Packet] = {
    "tcp to 80": IP() / TCP(sport=4000, dport=80),
    "tcp from 80": IP() / TCP(sport=80, dport=4000),
    "tcp6 to 80": IPv6() / TCP(sport=4000, dport=80),
    "tcp to 8050": IP() / TCP(sport=4000, dport=8050),
    "udp to 80": IP() / UDP(sport=4000, dport=80),
    "udp6 to 53": IPv6() / UDP(sport=4000, dport=53),
    "sctp to 80": IP() / SCTP(sport=4000, dport=80),
    "icmp": IP() / ICMP(),
    "icmp6": IPv6() / ICMPv6EchoRequest(),
    "udplite": IP(proto=136) / bytes(8),
    "gre": IP(proto=47) / bytes(8),
}

CASES: list[tuple[list[dict[str, Any]], set[str]]] = [
    ([], set(PACKETS)),
    ([{}], set(PACKETS)),
    ([{"protocol": "TCP"}], {"tcp to 80", "tcp from 80", "tcp6 to 80", "tcp to 8050"}),
    ([{"protocol": "tcp", "ports": [80]}], {"tcp to 80", "tcp from 80", "tcp6 to 80"}),
    ([{"protocol": 6, "ports": ["80"]}], {"tcp to 80", "tcp from 80", "tcp6 to 80"}),
    ([{"protocol": "TCP", "ports": [80, "8000:8100"]}], {"tcp to 80", "tcp from 80", "tcp6 to 80", "tcp to 8050"}),
    ([{"ports": [80]}], {"tcp to 80", "tcp from 80", "tcp6 to 80", "udp to 80", "sctp to 80"}),
    ([{"protocol": "UDP"}], {"udp to 80", "udp6 to 53"}),
    ([{"protocol": "SCTP", "ports": [80]}], {"sctp to 80"}),
    ([{"protocol": "ICMP"}], {"icmp"}),
    ([{"protocol": "ICMPv6"}], {"icmp6"}),
    ([{"protocol": "UDPLite"}], {"udplite"}),
    ([{"protocol": 47}], {"gre"}),
    ([{"protocol": "ICMP"}, {"protocol": "UDP", "ports": [53]}], {"icmp", "udp6 to 53"}),
]


@pytest.mark.parametrize(("filters", "matching"), CASES)
def test_libpcap_lets_through_what_the_filters_mean(
    filters: list[dict[str, Any]], matching: set[str], tmp_path: Path
) -> None:
    expression = bpf.expression([Filter.model_validate(entry) for entry in filters])
    for name, packet in PACKETS.items():
        capture = tmp_path / "packet.pcap"
        wrpcap(str(capture), Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / packet)
        read = subprocess.run(
            ["tcpdump", "-nr", capture, "--count", expression], capture_output=True, text=True, check=True
        )
        assert read.stdout.startswith("1 packet" if name in matching else "0 packets"), f"{name} by {expression!r}"
