"""Real pods as far as the capturer can tell: a network namespace, an address, and a process in kubelet's cgroup."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from agent.capturer.netns import Namespace
from agent.capturer.protocol import (
    Changed,
    Reply,
    Report,
    Start,
    State,
    Stop,
    Target,
    TargetStatus,
    decode,
    encode,
)

PORT = 9999
HEADERS = 14 + 20 + 8
"""Bytes before the payload of a UDP datagram: Ethernet, IPv4, UDP."""
HOST = Path(f"/proc/{os.getpid()}/ns/net")
"""The node of these tests is this process."""

_PROJECT = Path(__file__).resolve().parents[2]
_PATIENCE = 20.0
T = TypeVar("T")


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@dataclass
class Pod:
    """A pod with `eth0`, and a peer that reaches it over a veth pair."""

    uid: str
    address: str
    namespace: str
    peer: str
    process: subprocess.Popen[bytes]
    cgroup: Path

    def become(self, uid: str) -> None:
        """Take the UID that kube-apiserver gave: kubelet would only now make the cgroup."""
        self.uid = uid
        self.cgroup = self.cgroup.with_name(f"pod{uid}")
        self.cgroup.mkdir()
        (self.cgroup / "cgroup.procs").write_text(str(self.process.pid))

    def in_pod(self, function: Callable[[], T]) -> T:
        return in_namespace(self.namespace, function)

    def in_peer(self, function: Callable[[], T]) -> T:
        return in_namespace(self.peer, function)

    def receive(self, count: int, *, size: int = 64, port: int = PORT) -> None:
        """Let the peer send so many UDP datagrams to the pod, all different."""
        self.in_peer(lambda: send(self.address, count=count, size=size, port=port))

    def target(self, **settings: object) -> Target:
        defaults: dict[str, object] = {
            "capture_uid": str(uuid.uuid4()),
            "pod_uid": self.uid,
            "pod_name": "web-0",
            "pod_addresses": (self.address,),
            "filter": f"udp port {PORT}",
            "snap_length": 2048,
        }
        return Target(**(defaults | settings))  # type: ignore[arg-type]


def in_namespace(name: str, function: Callable[[], T]) -> T:
    with Namespace(os.open(f"/run/netns/{name}", os.O_RDONLY)) as namespace:
        return namespace.run(function)


def send(address: str, *, count: int, size: int = 64, port: int = PORT) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        for number in range(count):
            channel.sendto(number.to_bytes(8, "big").ljust(size, b"."), (address, port))


@contextlib.contextmanager
def make_pod(*, address: str = "10.201.0.2", peer_address: str = "10.201.0.1") -> Iterator[Pod]:
    uid = str(uuid.uuid4())
    name = f"kpc-test-{secrets.token_hex(4)}"
    namespace, peer = f"{name}-pod", f"{name}-peer"
    cgroup = _cgroup_root() / name / "kubepods" / "besteffort" / f"pod{uid}"
    with contextlib.ExitStack() as undo:
        for created in (namespace, peer):
            run("ip", "netns", "add", created)
            undo.callback(run, "ip", "netns", "del", created)
        run("ip", "link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", "peer0", "netns", peer)
        for inside, link, local in ((namespace, "eth0", address), (peer, "peer0", peer_address)):
            run("ip", "-n", inside, "link", "set", "lo", "up")
            run("ip", "-n", inside, "addr", "add", f"{local}/24", "dev", link)
            run("ip", "-n", inside, "link", "set", link, "up")
        process = subprocess.Popen(["ip", "netns", "exec", namespace, "sleep", "infinity"])
        undo.callback(process.wait)
        undo.callback(process.kill)
        cgroup.mkdir(parents=True)
        undo.callback(_remove_cgroups, cgroup.parents[2])
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        undo.callback((cgroup.parents[3] / "cgroup.procs").write_text, str(process.pid))
        eventually(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino == os.stat(f"/run/netns/{namespace}").st_ino)
        yield Pod(uid, address, namespace, peer, process, cgroup)


def _cgroup_root() -> Path:
    unified = Path("/sys/fs/cgroup/unified")
    return unified if unified.exists() else Path("/sys/fs/cgroup")


def _remove_cgroups(top: Path) -> None:
    for directory, _, _ in os.walk(top, topdown=False):
        _remove_cgroup(Path(directory))


def _remove_cgroup(path: Path) -> None:
    eventually(lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


def eventually(condition: Callable[[], T]) -> T:
    """The first true value of `condition`, which is asked again and again."""
    deadline = time.monotonic() + _PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError("it did not happen in time")
        time.sleep(0.01)
    return value


class Capturer:
    """A real capturer: supervisor and worker as in the container, and a connection as the agent's."""

    def __init__(self, directory: Path, *, prefix: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.captures = directory / "captures"
        self._socket = directory / "capturer.sock"
        environment = os.environ | {
            "CAPTURER_SOCKET": str(self._socket),
            "DATA_DIRECTORY": str(directory),
            "AGENT_UID": str(os.getuid()),
            "HOST_NETWORK_NAMESPACE": str(HOST),
        }
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "agent.capturer"], cwd=_PROJECT, env=environment
        )
        eventually(self._socket.exists)
        self.changes: list[TargetStatus] = []
        self._requests = 0
        self.connect()

    def connect(self) -> None:
        self._channel = socket.socket(socket.AF_UNIX)
        eventually(self._connected)
        self._channel.settimeout(_PATIENCE)
        self._lines = self._channel.makefile("rb")

    def _connected(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            self._channel.connect(str(self._socket))
            return True
        return False

    def worker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return eventually(lambda: int((children.read_text().split() or ["0"])[0]))

    def start(self, target: Target) -> TargetStatus:
        (status,) = self.ask(Start(request=self._number(), target=target)).targets
        return status

    def stop(self, target: Target) -> TargetStatus:
        (status,) = self.ask(Stop(request=self._number(), id=target.id)).targets
        return status

    def report(self, *, flush: bool = False) -> tuple[TargetStatus, ...]:
        return self.ask(Report(request=self._number(), flush=flush)).targets

    def ask(self, message: Start | Stop | Report) -> Reply:
        """All replies to it as one."""
        self._channel.sendall(encode(message))
        targets: tuple[TargetStatus, ...] = ()
        while True:
            answer = self.read()
            if isinstance(answer, Reply):
                assert answer.request == message.request
                assert not answer.error, answer.error
                targets += answer.targets
                if not answer.more:
                    return replace(answer, targets=targets)

    def read(self) -> Reply | Changed:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the worker closed the connection")
        message = decode(line)
        assert isinstance(message, Reply | Changed)
        if isinstance(message, Changed):
            self.changes.append(message.target)
        return message

    def read_to_end(self) -> None:
        """Read until the worker is gone."""
        with contextlib.suppress(ConnectionError):
            while True:
                self.read()
        self._disconnect()

    def next_state(self, state: State) -> TargetStatus:
        """Read until a change to this state is announced."""
        while not (self.changes and self.changes[-1].state is state):
            self.read()
        return self.changes[-1]

    def files(self, target: Target) -> list[Path]:
        return sorted(self.captures.joinpath(target.capture_uid).iterdir(), key=_sequence)

    def close(self) -> None:
        self._disconnect()
        self.process.terminate()
        assert self.process.wait(_PATIENCE) == 0

    def _disconnect(self) -> None:
        self._lines.close()
        self._channel.close()

    def _number(self) -> int:
        self._requests += 1
        return self._requests


def _sequence(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])
