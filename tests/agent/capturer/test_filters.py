"""What filters let through on a real interface, where Linux has taken the outer VLAN tag off."""

import socket
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet
from scapy.utils import RawPcapReader

from api import bpf
from api.packetcapture import Filter
from tests.agent.world import Capturer, Pod, run

ETHER = Ether(src="02:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff")
FOUR, SIX = IP(src="10.201.0.1", dst="10.201.0.2"), IPv6(src="fd00::1", dst="fd00::2")
TO_80 = TCP(sport=4000, dport=80)

PACKETS: dict[str, Packet] = {
    "plain": ETHER / FOUR / TO_80,
    "plain6": ETHER / SIX / TO_80,
    "another port": ETHER / FOUR / TCP(sport=4000, dport=81),
    "ping": ETHER / FOUR / ICMP() / bytes(32),
    "in a VLAN": ETHER / Dot1Q(vlan=7) / FOUR / TO_80,
    "in a VLAN6": ETHER / Dot1Q(vlan=7) / SIX / TO_80,
    "in two VLANs": ETHER / Dot1AD(vlan=100) / Dot1Q(vlan=7) / FOUR / TO_80,
    "in VXLAN": ETHER / FOUR / UDP(sport=4000, dport=4789) / VXLAN() / ETHER / FOUR / TO_80,
    "first fragment": ETHER / IP(src="10.201.0.1", dst="10.201.0.2", flags="MF") / TO_80 / bytes(12),
    "later fragment": ETHER / IP(src="10.201.0.1", dst="10.201.0.2", frag=4, proto=6) / TO_80 / bytes(12),
    "fragment6": ETHER / SIX / IPv6ExtHdrFragment(m=1) / TO_80 / bytes(12),
}

# As many as a capture may name, on one of which packets come.
HUNDREDS = [{"protocol": "TCP", "ports": [80, *range(1000 + start, 1126 + start, 2)]} for start in range(0, 512, 128)]


@pytest.mark.parametrize(
    ("filters", "through"),
    [
        ([{"protocol": "TCP", "ports": [80]}], {"plain", "plain6", "in a VLAN", "in a VLAN6", "first fragment"}),
        ([{"ports": [4789]}], {"in VXLAN"}),
        ([{"protocol": "ICMP", "icmp": {"type": "echo-request"}}], {"ping"}),
        (
            [{"protocol": "TCP"}],
            set(PACKETS) - {"ping", "in two VLANs", "in VXLAN"},
        ),
        (HUNDREDS, {"plain", "plain6", "in a VLAN", "in a VLAN6", "first fragment"}),
    ],
)
def test_a_filter_on_an_interface_means_what_it_says(
    pod: Pod, capturer: Capturer, filters: list[dict[str, Any]], through: set[str]
) -> None:
    for namespace, link in ((pod.namespace, "eth0"), (pod.peer, "peer0")):
        run("ip", "netns", "exec", namespace, "sysctl", "-qw", f"net.ipv6.conf.{link}.disable_ipv6=1")
    frames = {name: bytes(packet) for name, packet in PACKETS.items()}

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as channel:
            channel.bind(("peer0", 0))
            for frame in frames.values():
                channel.send(frame)

    target = pod.target(filter=bpf.expression([Filter.model_validate(entry) for entry in filters]))
    capturer.start(target)
    pod.in_peer(send)
    (status,) = capturer.stop(target).interfaces
    (recorded,) = status.files
    (file,) = capturer.captures.glob(f"*/{recorded.name}")
    with RawPcapReader(str(file)) as reader:
        captured = [packet for packet, _ in reader]
    sent = [name for name, frame in frames.items() if frame in captured]
    assert set(sent) == through
    assert status.packets == len(through)
