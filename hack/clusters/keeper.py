"""The process that a cluster lives by: `python -m hack.clusters.keeper NAME LOCK`, as `start` runs it.

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


def start(cluster: Cluster) -> None:
    """Start the keeper as nobody's child; from here on it is `alive` until it ends."""
    with _hold(cluster, "keeper") as lock, (cluster.logs / "keeper.log").open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", sys.executable, "-m", "hack.clusters.keeper", cluster.name, str(lock.fileno())],
            pass_fds=[lock.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            check=True,
        )


def main(name: str, lock: str) -> None:
    cluster = Cluster.load(name)
    held = os.fdopen(int(lock), "a")  # passed on by `start`, and locked
    os.set_inheritable(held.fileno(), False)
    _write_own_number(held)
    sweeper = _start_sweeper(cluster, held)
    cgroups.make(cluster)
    keepers = {machine: _start_machine(cluster, machine) for machine in cluster.machines}
    try:
        numbers = {machine: _only_child(process) for machine, process in keepers.items()}
        network.connect(cluster, numbers)
        _write_processes(cluster, numbers)
        for process in keepers.values():
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(b"connected\n")
        _wait_for_the_end(cluster, keepers, sweeper)
    finally:
        for process in keepers.values():
            process.kill()
        sweep(cluster)
        held.close()


def processes(cluster: Cluster) -> dict[str, int]:
    """The first process of each machine that lives, by its number on the host; empty until they are connected."""
    try:
        found: dict[str, int] = json.loads((cluster.state / PROCESSES).read_text())
    except FileNotFoundError:
        return {}
    return found


def entering(cluster: Cluster, machine: str) -> list[str]:
    """The command that enters a machine's namespaces, to be followed by one to run there."""
    found = processes(cluster)
    if machine not in found:
        raise Failure(f"no machine {machine!r} runs in cluster {cluster.name}; there are {', '.join(found)}")
    target = f"--target={found[machine]}"
    return ["nsenter", target, "--mount", "--net", "--pid", "--uts", "--ipc", "--wd", "--"]


def sweep(cluster: Cluster) -> list[Path]:
    """Remove what a dead cluster leaves behind on the machine; returns the cgroups that would not go."""
    network.disconnect(cluster)
    return cgroups.remove(cluster)


def alive(cluster: Cluster, role: str) -> int | None:
    """The process number of the keeper or the sweeper (0 while it only starts), None when it does not live.

    Who lives holds a lock, which unlike a number in a file can't be stale.
    """
    try:
        with (cluster.state / f"{role}.pid").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return None


def _hold(cluster: Cluster, role: str) -> IO[str]:
    file = (cluster.state / f"{role}.pid").open("a")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    return file


def _write_own_number(file: IO[str]) -> None:
    file.write(str(os.getpid()))
    file.flush()


def _start_machine(cluster: Cluster, machine: str) -> subprocess.Popen[bytes]:
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


def _wait_for_the_end(cluster: Cluster, keepers: dict[str, subprocess.Popen[bytes]], sweeper: int) -> None:
    """Return when the cluster is to end: when the control plane or the sweeper ended. A node alone may die."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    names = {process.pid: machine for machine, process in keepers.items()} | {sweeper: "sweeper"}
    while True:
        pid, status = os.wait()
        name = names[pid]
        print(f"{name} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
        if name in (CONTROL_PLANE, "sweeper"):
            return
        left = processes(cluster)
        del left[name]
        _write_processes(cluster, left)


def _start_sweeper(cluster: Cluster, held: IO[str]) -> int:
    keeper = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.close(keeper)
        return child
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.setsid()
        os.close(held.fileno())  # the keeper's lock has to end with the keeper
        with _hold(cluster, "sweeper") as own:
            _write_own_number(own)
            select.select([keeper], [], [])
            for left in sweep(cluster):
                print(f"could not remove {left}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def _write_processes(cluster: Cluster, numbers: dict[str, int]) -> None:
    path = cluster.state / PROCESSES
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(numbers))
    draft.rename(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
