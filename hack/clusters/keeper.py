"""The process that a cluster lives by: `python -m hack.clusters.keeper NAME`.

It starts the machines, and they die with it: each is tied to its parent by a death signal, and a PID namespace ends
with its first process. A sweeper beside it, which watches it end, removes what the kernel leaves: cgroups. Either of
the two may be killed at any moment.
"""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from hack.clusters import cgroups, network
from hack.clusters.cluster import CONTROL_PLANE, Cluster
from hack.clusters.failure import Failure

PROCESSES = "processes.json"


def main(name: str) -> None:
    cluster = Cluster.load(name)
    sweeper = _start_sweeper(cluster)  # first, so that it shares no lock with the keeper
    held = hold(cluster, "keeper")
    cgroups.make(cluster)
    keepers = {machine: _start(cluster, machine) for machine in cluster.machines}
    try:
        processes = {machine: _only_child(process) for machine, process in keepers.items()}
        network.connect(cluster, processes)
        _write_atomically(cluster.state / PROCESSES, json.dumps(processes))
        for process in keepers.values():
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(b"connected\n")
        _wait_for_the_end(keepers, sweeper)
    finally:
        for process in keepers.values():
            process.kill()
        sweep(cluster)
        held.close()


def processes(cluster: Cluster) -> dict[str, int]:
    """The first process of each machine, by its number on the host; empty until the machines are connected."""
    try:
        found: dict[str, int] = json.loads((cluster.state / PROCESSES).read_text())
    except FileNotFoundError:
        return {}
    return found


def entering(cluster: Cluster, machine: str) -> list[str]:
    """The command that enters a machine's namespaces, to be followed by one to run there."""
    found = processes(cluster)
    if machine not in found:
        raise Failure(f"no machine {machine!r} in cluster {cluster.name}; there are {', '.join(cluster.machines)}")
    target = f"--target={found[machine]}"
    return ["nsenter", target, "--mount", "--net", "--pid", "--uts", "--ipc", "--wd", "--"]


def sweep(cluster: Cluster) -> list[Path]:
    """Remove what a dead cluster leaves behind on the machine; returns the cgroups that would not go."""
    network.disconnect(cluster)
    return cgroups.remove(cluster)


def hold(cluster: Cluster, role: str) -> IO[str]:
    """Take the lock that says that the keeper, or the sweeper, lives; the file holds its process number."""
    file = (cluster.state / f"{role}.pid").open("a+")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def alive(cluster: Cluster, role: str) -> int | None:
    """The process number of the keeper or the sweeper, None when it does not live: a lock can't be stale."""
    try:
        with (cluster.state / f"{role}.pid").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return None


def _start(cluster: Cluster, machine: str) -> subprocess.Popen[bytes]:
    (cluster.state / machine).mkdir(exist_ok=True)
    command = [
        *("setpriv", "--pdeathsig=KILL"),
        *("unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"),
        *("--propagation=private", "--"),
        *(sys.executable, "-m", "hack.clusters.boot", cluster.name, machine),
    ]
    with cluster.log(machine, "boot").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd="/")


def _only_child(parent: subprocess.Popen[bytes]) -> int:
    """The process that `unshare` forks, which is PID 1 inside."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while parent.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.005)
    raise ChildProcessError("a machine did not start; its boot log says why")


def _wait_for_the_end(keepers: dict[str, subprocess.Popen[bytes]], sweeper: int) -> None:
    """Return when the cluster is to end: when the control plane or the sweeper ended. A node alone may die."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    names = {process.pid: machine for machine, process in keepers.items()} | {sweeper: "sweeper"}
    while True:
        pid, status = os.wait()
        name = names[pid]
        print(f"{name} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
        if name in (CONTROL_PLANE, "sweeper"):
            return


def _start_sweeper(cluster: Cluster) -> int:
    keeper = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.close(keeper)
        return child
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.setsid()
        with hold(cluster, "sweeper"):
            select.select([keeper], [], [])
            for left in sweep(cluster):
                print(f"could not remove {left}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def _write_atomically(path: Path, content: str) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(content)
    draft.rename(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
