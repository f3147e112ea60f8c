"""Every kind of packet that a pod may see, read back by those who will read the files: as many, and the same."""

import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Raw
from scapy.utils import RawPcapReader

from agent.capturer.protocol import InterfaceStatus
from tests.agent.world import Capturer, Pod, run

MAC = "02:00:00:00:00:01"
MTU = 9000


def ether(kind: int | None = None) -> Ether:
    return (
        Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") if kind is None else Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff", type=kind)
    )


def udp(size: int) -> UDP:
    return UDP(sport=1234, dport=9999) / Raw(bytes(range(256)) * (size // 256) + bytes(size % 256))


def packets() -> dict[str, list[bytes]]:
    """Frames by kind."""
    four, six = IP(src="10.201.0.1", dst="10.201.0.2"), IPv6(src="fd00::1", dst="fd00::2")
    kinds = {
        "IPv4": [ether() / four / udp(64), ether() / four / TCP(sport=1, dport=80, flags="S")],
        "IPv6": [ether() / six / udp(64), ether() / six / ICMPv6EchoRequest(data=b"x" * 56)],
        "VLAN": [ether() / Dot1Q(vlan=7) / four / udp(64), ether() / Dot1Q(vlan=7, prio=5) / six / udp(64)],
        "QinQ": [ether() / Dot1AD(vlan=100) / Dot1Q(vlan=7) / four / udp(64)],
        "fragments": [
            *(ether() / part for part in fragment(four / udp(4000), fragsize=1000)),  # type: ignore[no-untyped-call]
            *(ether() / part for part in fragment6(six / IPv6ExtHdrFragment() / udp(4000), 1280)),  # type: ignore[no-untyped-call]
        ],
        "jumbo": [ether() / four / udp(MTU - 28)],
        "jumbo VLAN": [ether() / Dot1Q(vlan=7) / four / udp(MTU - 28)],
        "tiny": [ether(0x88B5) / Raw(b"x" * 46)],
    }
    return {kind: [bytes(packet) for packet in frames] for kind, frames in kinds.items()}


@pytest.fixture
def wired(pod: Pod) -> Pod:
    """The pod, with room for jumbo frames, and with IPv6 turned off so that only what is sent is there."""
    for namespace, link in ((pod.namespace, "eth0"), (pod.peer, "peer0")):
        run("ip", "-n", namespace, "link", "set", link, "mtu", str(MTU + 8))
        run("ip", "netns", "exec", namespace, "sysctl", "-qw", f"net.ipv6.conf.{link}.disable_ipv6=1")
    return pod


def inject(pod: Pod, frames: Sequence[bytes]) -> None:
    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as channel:
            channel.bind(("peer0", 0))
            for frame in frames:
                channel.send(frame)

    pod.in_peer(send)


def counts(file: Path) -> dict[str, int]:
    """Packets of the file, as each reader counts them."""

    def output(*command: str) -> str:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "truncated" not in done.stderr
        assert "cut short" not in done.stderr
        return done.stdout

    with RawPcapReader(str(file)) as reader:
        scapy = sum(1 for _ in reader)
    capinfos = re.search(r"Number of packets = +(\d+)", output("capinfos", "-c", "-M", str(file)).replace(":", " ="))
    assert capinfos is not None
    return {
        "tcpdump": int(output("tcpdump", "--count", "-r", str(file)).split()[0]),
        "tshark": len(output("tshark", "-r", str(file), "-T", "fields", "-e", "frame.number").split()),
        "capinfos": int(capinfos[1]),
        "scapy": scapy,
    }


def read(file: Path) -> list[tuple[bytes, int]]:
    """Bytes of each packet, and the length that it had."""
    with RawPcapReader(str(file)) as reader:
        return [(packet, metadata.wirelen) for packet, metadata in reader]


def checked(capturer: Capturer, status: InterfaceStatus, *, count: int) -> Path:
    (recorded,) = status.files
    (file,) = capturer.captures.glob(f"*/{recorded.name}")
    assert (status.packets, recorded.packets, status.dropped) == (count, count, 0)
    assert recorded.size == file.stat().st_size
    assert counts(file) == dict.fromkeys(("tcpdump", "tshark", "capinfos", "scapy"), count)
    return file


@pytest.mark.parametrize("direct", [False, True])
def test_every_kind_of_packet_is_read_back_as_it_was_sent(wired: Pod, capturer: Capturer, direct: bool) -> None:
    sent = [frame for frames in packets().values() for frame in frames]
    target = wired.target(filter=f"ether src {MAC}", snap_length=262144, direct=direct)
    capturer.start(target)
    inject(wired, sent)
    (status,) = capturer.stop(target).interfaces
    file = checked(capturer, status, count=len(sent))
    assert read(file) == [(frame, len(frame)) for frame in sent]


def test_a_snap_length_cuts_every_kind_of_packet(wired: Pod, capturer: Capturer) -> None:
    sent = [frame for frames in packets().values() for frame in frames]
    target = wired.target(filter=f"ether src {MAC}", snap_length=64)
    capturer.start(target)
    inject(wired, sent)
    (status,) = capturer.stop(target).interfaces
    file = checked(capturer, status, count=len(sent))
    assert [length for _, length in read(file)] == [len(frame) for frame in sent]
    assert all(packet == frame[: len(packet)] for (packet, _), frame in zip(read(file), sent, strict=True))
    assert all(
        min(64, len(frame)) - 8 <= len(packet) <= 64 for (packet, _), frame in zip(read(file), sent, strict=True)
    )


@pytest.mark.parametrize(
    ("expression", "kinds"),
    [("vlan 7", ("VLAN", "jumbo VLAN")), ("vlan 100", ("QinQ",)), ("vlan 100 and vlan 7", ("QinQ",)), ("vlan 8", ())],
)
def test_trap_5_a_filter_sees_the_tags_that_linux_strips(
    wired: Pod, capturer: Capturer, expression: str, kinds: tuple[str, ...]
) -> None:
    sent = packets()
    target = wired.target(filter=f"ether src {MAC} and {expression}", snap_length=262144)
    capturer.start(target)
    inject(wired, [frame for frames in sent.values() for frame in frames])
    capturer.stop(target)
    (file,) = capturer.files(target)
    assert [packet for packet, _ in read(file)] == [frame for kind in kinds for frame in sent[kind]]


def test_trap_9_super_packets_are_whole(wired: Pod, capturer: Capturer) -> None:
    """With segmentation left to the network card a pod's TCP shows packets of up to 64 KiB."""
    target = wired.target(filter="tcp", snap_length=262144, max_file_bytes=100_000_000)
    payload = bytes(range(256)) * (4 << 10)

    def serve() -> socket.socket:
        return socket.create_server((wired.address, 8000))

    def connect() -> socket.socket:
        return socket.create_connection((wired.address, 8000))

    with wired.in_pod(serve) as server:
        capturer.start(target)
        with wired.in_peer(connect) as client, server.accept()[0] as accepted:
            client.settimeout(20)
            accepted.settimeout(20)
            received = 0
            for start in range(0, len(payload), 1 << 16):
                client.sendall(payload[start : start + (1 << 16)])
                while received < start + (1 << 16):
                    received += len(accepted.recv(1 << 20))
    (status,) = capturer.stop(target).interfaces
    file = checked(capturer, status, count=status.packets)
    found = read(file)
    assert max(length for _, length in found) > 30_000
    assert all(len(packet) == length for packet, length in found)
    assert carried(file) == payload


def carried(file: Path) -> bytes:
    """What the client sent, put together from the packets."""
    stream: dict[int, bytes] = {}
    for packet, _ in read(file):
        segment = Ether(packet)
        if segment[TCP].dport == 8000 and (size := segment[IP].len - 4 * segment[IP].ihl - 4 * segment[TCP].dataofs):
            stream[segment[TCP].seq] = bytes(segment[TCP].payload)[:size]
    return b"".join(stream[sequence] for sequence in sorted(stream))
