"""No packet of a pod that the selector does not match, of another namespace or another port is in any file."""

import random
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from hack.clusters.kubectl import Kubectl
from tests.e2e import peers
from tests.e2e.captures import Capture, capturing, until
from tests.e2e.peers import Datagram, Peer

ROUNDS = 5
SPEC = {
    "selector": 'team == "red"',
    "filters": [{"protocol": "UDP", "ports": [peers.PORT]}],
    "rotation": {"maxFiles": 10},  # a pod that comes back begins a new file
}


def test_twenty_pods_that_are_relabelled_at_random_have_exactly_their_packets_in_files(kubectl: Kubectl) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 - to repeat a failure
    choose = random.Random(seed)  # noqa: S311 - repeatable
    planned = [Peer("dev", f"peer-{number}") for number in range(16)]
    planned += [Peer("hipstershop", f"peer-{number}") for number in range(4)]
    with (
        peers.running(kubectl, planned) as everyone,
        capturing(kubectl, "reds", "dev", **SPEC) as capture,
    ):
        own = [peer for peer in everyone if peer.namespace == "dev"]
        foreign = [peer for peer in everyone if peer.namespace != "dev"]
        label(kubectl, foreign, "red")
        red: set[Peer] = set()
        due: dict[Peer, set[Datagram]] = {peer: set() for peer in everyone}
        possible: dict[Peer, set[Datagram]] = {peer: set() for peer in everyone}
        for number in range(ROUNDS):
            before, red = red, set(choose.sample(own, choose.randrange(1, len(own))))
            with sending(kubectl, everyone, f"between-{number}") as words:
                label(kubectl, red - before, "red")
                label(kubectl, before - red, "blue")
                settle(capture, red)
            for peer in before | red:
                possible[peer] |= {datagram for word in words for datagram in _of(peer, everyone, word)}
            peers.send(kubectl, everyone[0], everyone, f"round-{number}")
            for peer in red:
                due[peer] |= _of(peer, everyone, f"round-{number}")
        files = capture.files()
        held = {(file["pod"], file["name"]): peers.datagrams(capture.download(file)) for file in files}

    assert not {file["pod"] for file in files} - {peer.name for peer in own}
    assert sum(file["dropped"] for file in files) == 0
    for peer in own:
        found = [datagram for (pod, _), data in held.items() if pod == peer.name for datagram in data]
        assert len(found) == len(set(found)), f"{peer.name} has packets twice"
        assert due[peer] <= set(found), f"{peer.name} lacks packets"
        assert set(found) <= due[peer] | possible[peer], f"{peer.name} has packets of a time when it was not selected"
    assert sum(map(len, due.values())) > 0


def label(kubectl: Kubectl, chosen: Collection[Peer], team: str) -> None:
    for namespace in {peer.namespace for peer in chosen}:
        names = [peer.name for peer in chosen if peer.namespace == namespace]
        kubectl("label", "pods", *names, f"--namespace={namespace}", f"team={team}", "--overwrite")


def settle(capture: Capture, red: Collection[Peer]) -> None:
    """Wait until files are written for these pods and for no others."""
    names = {peer.name for peer in red}
    until(
        f"files of {len(names)} pods to be written",
        lambda: {file["pod"] for file in capture.files() if file["state"] == "Writing"} == names,
    )


@contextmanager
def sending(kubectl: Kubectl, everyone: list[Peer], prefix: str) -> Iterator[list[str]]:
    """Traffic without a pause while something changes; afterwards the list has all words that were sent."""
    words: list[str] = []
    enough = threading.Event()

    def send() -> None:
        while not enough.is_set():
            words.append(f"{prefix}-{len(words)}")
            peers.send(kubectl, everyone[0], everyone, words[-1])

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield words
    finally:
        enough.set()
        sender.join()


def _of(peer: Peer, everyone: list[Peer], word: str) -> set[Datagram]:
    """What that word makes pass the peer's interface: what it sends, and what is sent to it."""
    return {
        datagram for datagram in peers.sent(everyone, word) if peer.address in (datagram.source, datagram.destination)
    }
