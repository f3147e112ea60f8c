"""The captures that are compared: our capturer as its container runs it, tcpdump and dumpcap."""

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from agent.capturer.protocol import State
from hack.benchmarks import process
from hack.benchmarks.programs import install
from hack.benchmarks.wire import FILTER, INTERFACE, Wire
from hack.clusters.failure import Failure
from tests.agent.world import Capturer

SNAP_LENGTH: Final = 262144
_PATIENCE: Final = 30.0


@dataclass(frozen=True, slots=True)
class Setup:
    """How to capture. `ring` and `file_bytes` are in bytes; without `file_bytes` there is one file without a limit."""

    ring: int
    directory: Path
    file_bytes: int = 0
    files: int = 1


@dataclass(frozen=True, slots=True)
class Total:
    """What an engine says of itself at its end."""

    written: int
    dropped: int


class Recording(Protocol):
    """A capture that runs."""

    @property
    def pid(self) -> int: ...

    def cpu_seconds(self) -> float:
        """CPU time of the process until now, or until its end."""

    def stop(self) -> Total:
        """End it; all files are written and closed then. Raises Failure."""

    def files(self) -> list[Path]:
        """Its files in the order of time."""


Engine = Callable[[Wire, Setup], AbstractContextManager[Recording]]


class _Ours:
    def __init__(self, capturer: Capturer, wire: Wire, setup: Setup, *, direct: bool) -> None:
        self._capturer = capturer
        self._target = wire.pod.target(
            filter=FILTER,
            snap_length=SNAP_LENGTH,
            ring_bytes=setup.ring,
            max_file_bytes=setup.file_bytes or 1 << 50,
            max_files=setup.files,
            direct=direct,
        )
        status = capturer.start(self._target)
        if status.state is not State.CAPTURING:
            raise Failure(f"the capture does not start: {status.reason}: {status.message}")
        self.pid = capturer.worker_pid()

    def cpu_seconds(self) -> float:
        return process.cpu_seconds(self.pid)  # the worker outlives its captures

    def stop(self) -> Total:
        status = self._capturer.stop(self._target)
        if status.state is not State.STOPPED:
            raise Failure(f"the capture failed: {status.reason}: {status.message}")
        (interface,) = status.interfaces
        return Total(interface.packets, interface.dropped)

    def files(self) -> list[Path]:
        return self._capturer.files(self._target)


@contextlib.contextmanager
def _ours(wire: Wire, setup: Setup, *, direct: bool) -> Iterator[Recording]:
    log = setup.directory / "capturer.log"
    capturer = Capturer(setup.directory, prefix=("sh", "-c", 'exec "$@" 2>"$0"', str(log)))
    try:
        yield _Ours(capturer, wire, setup, direct=direct)
    finally:
        capturer.close()


def ours(wire: Wire, setup: Setup) -> AbstractContextManager[Recording]:
    """Our capturer, as captures are by default."""
    return _ours(wire, setup, direct=False)


def ours_direct(wire: Wire, setup: Setup) -> AbstractContextManager[Recording]:
    """Our capturer, writing past the page cache."""
    return _ours(wire, setup, direct=True)


class _Tool:
    """tcpdump or dumpcap as a process in the pod's namespace."""

    def __init__(self, wire: Wire, setup: Setup, command: list[str], *, ready: str, totals: str) -> None:
        self._directory = setup.directory
        self._totals = totals
        self._said = setup.directory / "said.log"
        self._cpu_in_all: float | None = None
        with self._said.open("w") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", wire.pod.namespace, *command],
                cwd=setup.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self.process.pid
        deadline = time.monotonic() + _PATIENCE
        while ready not in self._said.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"{command[0]} did not start", log=self._said)
            time.sleep(0.01)

    def cpu_seconds(self) -> float:
        return process.cpu_seconds(self.pid) if self._cpu_in_all is None else self._cpu_in_all

    def stop(self) -> Total:
        self.process.send_signal(signal.SIGINT)
        self._cpu_in_all = process.ended(self.process, timeout=_PATIENCE)
        return totals(self._said.read_text(), self._totals)

    def files(self) -> list[Path]:
        found = [path for path in self._directory.iterdir() if path != self._said]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)


@contextlib.contextmanager
def _tool(wire: Wire, setup: Setup, command: list[str], *, ready: str, totals: str) -> Iterator[Recording]:
    tool = _Tool(wire, setup, command, ready=ready, totals=totals)
    try:
        yield tool
    finally:
        tool.process.kill()
        tool.process.wait()


def totals(said: str, pattern: str) -> Total:
    """What a tool said at its end; `pattern` has the groups `written` and `dropped`. Raises Failure."""
    match = re.search(pattern, said)
    if match is None:
        raise Failure(f"no totals in what the tool said:\n{said}")
    return Total(int(match["written"]), int(match["dropped"]))


TCPDUMP_TOTALS: Final = r"(?P<written>\d+) packets? captured\n(?:.*\n)*?(?P<dropped>\d+) packets? dropped by kernel"
DUMPCAP_TOTALS: Final = r"Packets received/dropped on interface \S+: (?P<written>\d+)/(?P<dropped>\d+)"


def tcpdump(wire: Wire, setup: Setup) -> AbstractContextManager[Recording]:
    """tcpdump as people use it for a file, with its default block timeout and buffering."""
    command = ["tcpdump", "-n", "-i", INTERFACE, "-Z", "root", "-s", str(SNAP_LENGTH)]
    command += ["-B", str(setup.ring >> 10), "-w", "capture.pcap"]
    if setup.file_bytes:
        command += ["-C", str(setup.file_bytes // 1_000_000), "-W", str(setup.files)]
    return _tool(wire, setup, [*command, FILTER], ready="listening on", totals=TCPDUMP_TOTALS)


def dumpcap(wire: Wire, setup: Setup) -> AbstractContextManager[Recording]:
    """Wireshark's dumpcap, writing pcap as the others do."""
    command = ["dumpcap", "-i", INTERFACE, "-f", FILTER, "-s", str(SNAP_LENGTH), "-P"]
    command += ["-B", str(setup.ring >> 20), "-w", "capture.pcap"]
    if setup.file_bytes:
        command += ["-b", f"filesize:{setup.file_bytes // 1000}", "-b", f"files:{setup.files}"]
    return _tool(wire, setup, command, ready="File: ", totals=DUMPCAP_TOTALS)


def require() -> None:
    """Install what is compared. Raises Failure."""
    install("tcpdump", "tshark", "wireshark-common", "iproute2", "procps", "libpcap0.8")
    missing = [program for program in ("tcpdump", "dumpcap") if shutil.which(program) is None]
    if missing:
        raise Failure(f"{', '.join(missing)} was installed and can't be found in PATH")
