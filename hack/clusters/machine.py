"""A machine of the cluster from inside: its first process gives it files of its own and runs its programs."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hack.clusters.binaries import HACK
from hack.clusters.cluster import CONTROL_PLANE, Cluster, cache

ENDED = "ended"


class Machine:
    """One machine; made and used by its PID 1 only."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.address = str(cluster.address(name))
        # The objects are kept, since Python reaps the processes of forgotten ones by itself, and tells nobody.
        self._running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}

    @property
    def files(self) -> Path:
        """The machine's own settings and state, on the host's disk."""
        return self.cluster.state / self.name

    def program(self, name: str) -> str:
        """Where a program is that was found or built for the cluster; the machine itself can build nothing."""
        return self.cluster.programs.get(name, name)

    def isolate(self) -> None:
        """Give the machine what it may write to: its own /etc, /var and /run. The rest it shares with the host."""
        mount("--make-rshared", "/")  # propagation works inside; at the namespace's border everything stays private
        kept = [(path, os.open(path, os.O_PATH)) for path in (cache(), HACK.parent)]
        scratch = self.files / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        tmpfs(scratch)
        for directory in ("etc", "var"):
            upper, work = scratch / directory / "upper", scratch / directory / "work"
            upper.mkdir(parents=True)
            work.mkdir()
            layers = f"lowerdir=/{directory},upperdir={upper},workdir={work}"
            mount("-t", "overlay", "-o", layers, "overlay", f"/{directory}")
        tmpfs(Path("/run"))
        for path, descriptor in kept:  # the project and the cache may lie below what was just covered
            path.mkdir(parents=True, exist_ok=True)
            mount("--no-canonicalize", "--rbind", f"/proc/self/fd/{descriptor}", str(path), descriptors=[descriptor])
            os.close(descriptor)
        socket.sethostname(self.name)
        hosts = "".join(f"{self.cluster.address(name)} {name}\n" for name in self.cluster.machines)
        replace(Path("/etc/hosts"), f"127.0.0.1 localhost\n{hosts}")
        # CoreDNS beside the control plane, never the resolver of the machine underneath
        replace(Path("/etc/resolv.conf"), f"nameserver {self.cluster.address(CONTROL_PLANE)}\n")

    def start(self, name: str, arguments: Sequence[str | Path]) -> None:
        """Start a program that is to run as long as the machine does; its output goes to a log of its own."""
        command = [self.program(name), *arguments]
        with self.cluster.log(self.name, name).open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self._running[process.pid] = name, process

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait without end: `up` is who loses patience, or sees which program has ended meanwhile."""
        while not ready():
            self._reap(os.WNOHANG)
            time.sleep(0.05)

    def stay(self) -> NoReturn:
        """Be PID 1 for ever: reap what is orphaned, and write down which of the programs has ended."""
        while True:
            self._reap(0)

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(-1, options)
        except ChildProcessError:
            time.sleep(1)
            return
        if known := self._running.pop(pid, None):
            program, process = known
            process.returncode = os.waitstatus_to_exitcode(status)
            with (self.files / ENDED).open("a") as file:
                file.write(f"{program}\n")
            print(f"{program} ended with {process.returncode}", file=sys.stderr, flush=True)


def ended(cluster: Cluster) -> list[tuple[str, str]]:
    """The programs that should run and do not, as (machine, program)."""
    found = []
    for machine in cluster.machines:
        path = cluster.state / machine / ENDED
        if path.exists():
            found += [(machine, program) for program in path.read_text().split()]
    return found


def mount(*arguments: str, descriptors: Sequence[int] = ()) -> None:
    subprocess.run(["mount", *arguments], check=True, pass_fds=descriptors)


def tmpfs(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(directory))


def replace(path: Path, content: str) -> None:
    """Write a file anew; written through, a link would change what it points to."""
    path.unlink(missing_ok=True)
    path.write_text(content)
