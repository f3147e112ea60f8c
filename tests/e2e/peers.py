"""Pods that send each other numbered datagrams when told to, so that a test knows every packet there is."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import packets, until

PORT = 9000
"""Where the datagrams go that a capture takes; as many go to the next port."""
COPIES = 2

_CONTROL = 9999
_IMAGE = "kubepcap.invalid/tools:dev"
_RUN = f"""
import socket, threading
for port in ({PORT}, {PORT + 1}):
    sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sink.bind(("", port))
    threading.Thread(target=lambda sink=sink: [0 for _ in iter(lambda: sink.recv(4096), None)], daemon=True).start()
control = socket.create_server(("", {_CONTROL}), backlog=64)
while True:
    order, _ = control.accept()
    word, *addresses = order.makefile().readline().split()
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind(("", {PORT + 2}))
    for copy in range({COPIES}):
        for address in addresses:
            for port in ({PORT}, {PORT + 1}):
                sender.sendto(f"{{word}}/{{copy}}".encode(), (address, port))
    sender.close()
    order.sendall(b"done")
    order.close()
"""
_TELL = f"""
import socket, sys
word, *addresses = sys.argv[1:]
for address in addresses:
    control = socket.create_connection((address, {_CONTROL}), timeout=20)
    control.sendall(" ".join([word, *(other for other in addresses if other != address)]).encode() + b"\\n")
    assert control.recv(4) == b"done"
"""


@dataclass(frozen=True)
class Peer:
    """One of the pods."""

    namespace: str
    name: str
    address: str = ""


@dataclass(frozen=True, order=True)
class Datagram:
    """A packet of theirs; `word` is what they were told to send."""

    word: str
    copy: int
    source: str
    destination: str


def send(kubectl: Kubectl, teller: Peer, peers: Iterable[Peer], word: str) -> None:
    """Let each send to each other, to both ports, and wait until all have."""
    addresses = [peer.address for peer in peers]
    kubectl("exec", f"--namespace={teller.namespace}", teller.name, "--", "python3", "-c", _TELL, word, *addresses)


def sent(peers: Sequence[Peer], word: str) -> set[Datagram]:
    """What goes to the captured port when all send this word."""
    return {
        Datagram(word, copy, source.address, destination.address)
        for source in peers
        for destination in peers
        if source != destination
        for copy in range(COPIES)
    }


def datagrams(pcap: bytes) -> list[Datagram]:
    """What a capture file holds. Fails at a packet that is none of theirs to the captured port."""
    found = []
    for data in packets(pcap):
        packet = Ether(data)
        assert UDP in packet, packet.summary()
        assert packet[UDP].dport == PORT, packet.summary()
        word, copy = bytes(packet[UDP].payload).decode().split("/")
        found.append(Datagram(word, int(copy), packet[IP].src, packet[IP].dst))
    return found


@contextmanager
def running(kubectl: Kubectl, peers: Sequence[Peer]) -> Iterator[list[Peer]]:
    """The peers as pods, once all have addresses and listen."""
    pods = {"apiVersion": "v1", "kind": "List", "items": [_pod(peer) for peer in peers]}
    kubectl("apply", "--filename=-", input=json.dumps(pods))
    try:
        for namespace in {peer.namespace for peer in peers}:
            kubectl("wait", f"--namespace={namespace}", "--for=condition=Ready", "pod", "-lpeers=all", "--timeout=180s")
        yield [_found(kubectl, peer) for peer in peers]
    finally:
        for namespace in {peer.namespace for peer in peers}:
            kubectl("delete", "pod", f"--namespace={namespace}", "-lpeers=all", "--now", "--wait=false")
        until("the peers to be gone", lambda: not any(_left(kubectl, peer) for peer in peers), patience=120)


def _left(kubectl: Kubectl, peer: Peer) -> str:
    return kubectl("get", "pod", peer.name, f"--namespace={peer.namespace}", "--ignore-not-found", "-oname").stdout


def _found(kubectl: Kubectl, peer: Peer) -> Peer:
    pod = kubectl.json("get", "pod", peer.name, f"--namespace={peer.namespace}")
    return Peer(peer.namespace, peer.name, pod["status"]["podIP"])


def _pod(peer: Peer) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": peer.name, "namespace": peer.namespace, "labels": {"peers": "all", "team": "blue"}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "peer",
                    "image": _IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-c", textwrap.dedent(_RUN)],
                    "readinessProbe": {
                        "periodSeconds": 1,
                        "exec": {"command": ["sh", "-c", f"grep -q :{_CONTROL:04X} /proc/net/tcp"]},
                    },
                }
            ],
        },
    }
