"""Starting and ending a cluster, and saying how it is."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from hack.clusters import binaries, keeper, server
from hack.clusters.api import Api, answers
from hack.clusters.cluster import CONTROL_PLANE, Cluster, cache, state_directory
from hack.clusters.failure import Failure
from hack.clusters.machine import ended
from hack.clusters.node import PAUSE_ARCHIVE
from hack.oci.build import pause, store

PACKAGES = ("containerd", "runc", "containernetworking-plugins", "iptables", "iproute2", "util-linux", "mount")
PATIENCE = 120


def up(name: str) -> Cluster:
    """Start the cluster, or find it already up. The first start on a machine installs and builds what it needs."""
    if os.geteuid() != 0:
        raise Failure("a cluster needs root: namespaces, mounts and cgroups; run it with sudo")
    with _exclusively(name):
        if running(name):
            cluster = Cluster.load(name)
            print(f"cluster {name} is already up: {cluster.api_url}")
            return cluster
        with phase("packages, binaries and the pause image"):
            subprocess.run([binaries.HACK / "packages", *PACKAGES], check=True)
            programs = binaries.find_all()
        with phase("certificates"):
            _clear(name)
            cluster = Cluster.allocate(name)
            (cluster.state / "programs.json").write_text(json.dumps(programs))
            _write_pause_image(cluster)
            server.write_certificates(cluster)
        try:
            _start(cluster)
        except BaseException:
            _end(cluster)
            raise
    return cluster


def down(name: str) -> None:
    """End the cluster; what it logged stays until the next start. Failure when something would not go."""
    with _exclusively(name):
        try:
            cluster = Cluster.load(name)
        except Failure:
            print(f"cluster {name} is not up")
            return
        with phase(f"cluster {name} down"):
            _end(cluster)


def status(name: str) -> bool:
    """Print how the cluster is; whether it is up and well."""
    if not running(name):
        print(f"cluster {name} is down")
        return False
    cluster = Cluster.load(name)
    api = Api(cluster.kubeconfig)
    ready = api.ready()
    print(f"cluster {name}: keeper {keeper.alive(cluster, 'keeper')}, {cluster.api_url} {_said(ready)}")
    nodes = api.ready_nodes() if ready else set()
    processes = keeper.processes(cluster)
    for machine in cluster.machines:
        well = ready if machine == CONTROL_PLANE else machine in nodes & set(processes)
        print(f"  {machine:<14} {cluster.address(machine)!s:<15} pid {processes.get(machine, '-'):<8} {_said(well)}")
    fallen = ended(cluster)
    for machine, program in fallen:
        print(f"  {program} on {machine} has ended; read {cluster.log(machine, program)}")
    print(f"  export KUBECONFIG={cluster.kubeconfig}")
    return ready and nodes == set(cluster.nodes) == set(processes) - {CONTROL_PLANE} and not fallen


def running(name: str) -> bool:
    try:
        running_cluster(name)
    except Failure:
        return False
    return True


def running_cluster(name: str) -> Cluster:
    """The cluster of that name; Failure when it is not up."""
    cluster = Cluster.load(name)
    if keeper.alive(cluster, "keeper") is None or not keeper.processes(cluster):
        raise Failure(f"cluster {name} has ended; start it with: hack/cluster --name {name} up")
    return cluster


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Say in one line what was done and how long it took."""
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:6.1f} s  {what}", flush=True)


def _said(ready: bool) -> str:
    return "ready" if ready else "NOT ready"


def _start(cluster: Cluster) -> None:
    with phase("namespaces and network"):
        keeper.start(cluster)
        _wait(cluster, "the machines", lambda: bool(keeper.processes(cluster)))
    api = Api(cluster.kubeconfig)
    with phase("API server"):
        _wait(cluster, "kube-apiserver", api.ready)
    with phase("nodes"):
        _wait(cluster, "the nodes", lambda: answers(lambda: api.ready_nodes() == set(cluster.nodes)))
    with phase("DNS"):
        url = f"http://{cluster.address(CONTROL_PLANE)}:{server.DNS_HEALTH_PORT}/ready"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        _wait(cluster, "CoreDNS", lambda: answers(lambda: direct.open(url, timeout=2).status == 200))


def _wait(cluster: Cluster, what: str, ready: Callable[[], bool]) -> None:
    """Wait for a part of the cluster; Failure, with the log to read, as soon as it can't come any more."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if keeper.alive(cluster, "keeper") is None:
            raise Failure(f"{what} did not come up: the keeper ended", log=_last_written(cluster))
        for machine, program in ended(cluster):
            raise Failure(f"{what} did not come up: {program} ended", log=cluster.log(machine, program))
        if time.monotonic() > deadline:
            raise Failure(f"{what} did not come up in {PATIENCE} s; read the logs in {cluster.logs}")
        time.sleep(0.05)


def _last_written(cluster: Cluster) -> Path:
    boots = [cluster.log(machine, "boot") for machine in cluster.machines]
    told = [log for log in boots if log.exists() and log.stat().st_size]
    return max(told, key=lambda log: log.stat().st_mtime, default=cluster.logs / "keeper.log")


def _end(cluster: Cluster) -> None:
    told = False
    deadline = time.monotonic() + PATIENCE
    while (pid := keeper.alive(cluster, "keeper")) is not None or keeper.alive(cluster, "sweeper") is not None:
        if pid and not told:
            os.kill(pid, signal.SIGTERM)
            told = True
        if time.monotonic() > deadline:
            raise Failure(f"the keeper of cluster {cluster.name} does not end", log=cluster.logs / "keeper.log")
        time.sleep(0.02)
    left = keeper.sweep(cluster)  # both may have been killed, or the machine switched off
    if left:
        raise Failure(f"could not remove {', '.join(map(str, left))}: something in it still runs")
    for entry in cluster.state.iterdir():
        if entry != cluster.logs and entry.is_dir():
            shutil.rmtree(entry)
        elif entry.is_file():
            entry.unlink()


def _clear(name: str) -> None:
    """Make room for a new start; a cluster that died with the machine is swept up first."""
    if (state_directory(name) / "cluster.json").exists():
        _end(Cluster.load(name))
    shutil.rmtree(state_directory(name), ignore_errors=True)
    (state_directory(name) / "log").mkdir(parents=True)


@contextlib.contextmanager
def _exclusively(name: str) -> Iterator[None]:
    """One start or end of a cluster at a time."""
    directory = cache() / "clusters"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_pause_image(cluster: Cluster) -> None:
    with (cluster.state / PAUSE_ARCHIVE).open("wb") as output:
        store().export(pause(), output)
