"""A pod with traffic at a known rate: a veth pair between two network namespaces, and the generator at its far end."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hack.benchmarks.programs import build
from hack.clusters.failure import Failure
from tests.agent.world import PORT, Pod, make_pod

FILTER: Final = f"udp port {PORT}"
INTERFACE: Final = "eth0"


@dataclass(frozen=True, slots=True)
class Sent:
    """What went over the wire: the packets numbered from `first`, `sent` of them.

    What the veth refused is not among them: it was sent again, and counted in `refused`.
    """

    first: int
    sent: int
    refused: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Counted:
    """What files hold; see checker.c. `missing` are ranges of numbers between `lowest` and `highest`."""

    packets: int
    numbered: int
    twice: int
    disordered: int
    torn: int
    headless: int
    lowest: int | None
    highest: int | None
    missing: list[tuple[int, int]]


class Traffic:
    """A generator at work."""

    def __init__(self, process: subprocess.Popen[str], first: int) -> None:
        self.process = process
        self._first = first

    def stop(self) -> Sent:
        """End it now. Raises Failure."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> Sent:
        """Wait for its end. Raises Failure."""
        said, complaint = self.process.communicate()
        if self.process.returncode:
            raise Failure(f"the generator failed: {complaint}")
        return Sent(first=self._first, **json.loads(said))


class Wire:
    """The pod, and what can be sent to it."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self._generator = build("generator")
        said = _run("ip", "-n", pod.namespace, "-json", "link", "show", INTERFACE)
        self._address: str = json.loads(said)[0]["address"]

    @contextlib.contextmanager
    def traffic(
        self, *, size: int, rate: float, packets: int = 0, seconds: float = 0, first: int = 0
    ) -> Iterator[Traffic]:
        """Send packets of `size` bytes, `rate` a second (0: as fast as it goes) until one of the ends has come."""
        command = ["ip", "netns", "exec", self.pod.peer, str(self._generator), "peer0", self._address, str(PORT)]
        command += [str(size), str(rate), str(packets), str(seconds), str(first)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            yield Traffic(process, first)
        finally:
            process.kill()
            process.communicate()

    def send(self, *, size: int, rate: float, packets: int = 0, seconds: float = 0) -> Sent:
        """Send and wait for the end. Raises Failure."""
        with self.traffic(size=size, rate=rate, packets=packets, seconds=seconds) as traffic:
            return traffic.wait()


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """A wire that lives as long as the block, silent but for what is sent: without IPv6 no router is looked for."""
    with make_pod() as pod:
        for namespace in (pod.namespace, pod.peer):
            _run("ip", "netns", "exec", namespace, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        yield Wire(pod)


def count(files: Iterable[Path]) -> Counted:
    """Count the generator's packets in the files, which are in the order of time. Raises Failure when one is broken."""
    done = subprocess.run([build("checker"), *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"a file can't be read: {done.stderr.strip()}")
    document: dict[str, Any] = json.loads(done.stdout)
    document["missing"] = [(first, last) for first, last in document["missing"]]
    return Counted(**document)


def file_system(path: Path) -> str:
    """The type of the file system that holds the path, such as ext4."""
    said = _run("stat", "--file-system", "--format=%T", str(path))
    return re.sub(r"^ext2/ext3$", "ext4", said.strip())  # one magic number for all three


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
