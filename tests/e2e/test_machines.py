"""What hack/cluster promises about the machine it runs on; each test starts a cluster of its own beside the others."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hack.clusters import binaries, keeper, lifecycle
from hack.clusters.api import Api
from hack.clusters.cluster import Cluster
from hack.clusters.failure import Failure

PATIENCE = 30


def processes_of(cluster: Cluster) -> list[str]:
    """What runs on the machine in this cluster's name: its programs have its state directory among their arguments."""
    own = (str(cluster.state).encode(), f"\0{cluster.name}\0".encode())
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(mark in command for mark in own):
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def left_by(cluster: Cluster) -> list[str]:
    """Everything of the cluster that is still on the machine."""
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, check=True).stdout
    mounts = Path("/proc/self/mounts").read_text()
    hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]
    groups = [str(path) for hierarchy in hierarchies if (path := hierarchy / cluster.cgroup).exists()]
    return [
        *(["its interface"] if cluster.host_interface in links else []),
        *(["a mount"] if str(cluster.state) in mounts else []),
        *groups,
        *processes_of(cluster),
    ]


def network_namespaces() -> int:
    """How many network namespaces the machine's processes and mounts hold."""
    listing = ["lsns", "--type=net", "--noheadings", "--output=NS"]
    return len(subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split())


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def machine() -> Iterator[Cluster]:
    lifecycle.down("e2e-machine")
    cluster = lifecycle.up("e2e-machine")
    yield cluster
    lifecycle.down(cluster.name)


def test_down_leaves_nothing_on_the_machine(machine: Cluster) -> None:
    namespaces = network_namespaces()
    assert {"its interface"} < set(left_by(machine))
    lifecycle.down(machine.name)
    assert left_by(machine) == []
    assert network_namespaces() <= namespaces - len(machine.machines)
    assert not lifecycle.status(machine.name)


@pytest.mark.parametrize("role", ["keeper", "sweeper"])
def test_the_death_of_what_keeps_it_leaves_nothing_either(machine: Cluster, role: str) -> None:
    pid = keeper.alive(machine, role)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not left_by(machine)), left_by(machine)


def test_a_cluster_that_is_up_is_not_started_again(machine: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    pid = keeper.alive(machine, "keeper")
    assert lifecycle.up(machine.name) == machine
    assert "already up" in capsys.readouterr().out
    assert keeper.alive(machine, "keeper") == pid


def test_two_clusters_stand_side_by_side_and_end_alone(machine: Cluster, cluster: Cluster) -> None:
    assert Api(machine.kubeconfig).ready_nodes() == set(machine.nodes)
    lifecycle.down(machine.name)
    assert Api(cluster.kubeconfig).ready_nodes() == set(cluster.nodes)


def test_a_node_alone_may_die_and_status_says_so(machine: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    os.kill(keeper.processes(machine)["node-b"], signal.SIGKILL)
    assert eventually(lambda: not lifecycle.status(machine.name))
    assert Api(machine.kubeconfig).ready()
    lifecycle.down(machine.name)
    assert left_by(machine) == []


def test_a_program_that_does_not_start_is_named_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd = tmp_path / "etcd"
    version = binaries.pinned_version("etcd")
    etcd.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'etcd Version: {version}' && exit\necho no luck\nexit 3\n")
    etcd.chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(Failure, match="etcd ended") as failed:
        lifecycle.up("e2e-broken")
    assert "no luck" in str(failed.value)
    assert "control-plane.etcd.log" in str(failed.value)
    assert not lifecycle.running("e2e-broken")
    assert not list(Path("/sys/fs/cgroup").glob("*/kubepcap-e2e-broken"))
