"""The control groups of a cluster: one parent in every hierarchy, so that what is left can be found and removed."""

import contextlib
import os
import time
from pathlib import Path

from hack.clusters.cluster import Cluster

ROOT = Path("/sys/fs/cgroup")

WEIGHTS = {"cpu.shares": "16384", "cpu.weight": "1600"}
"""What all pods of a cluster weigh together, by the names of v1 and v2.

By default that would be as much as a single thread of the machine's, and kube-apiserver, which runs outside as do the
tests that load it, would starve them.
"""


def unified() -> bool:
    """Whether the machine has cgroup v2 alone. Clusters were tried on v1, not yet on v2."""
    return (ROOT / "cgroup.controllers").exists()


def path_of(cluster: Cluster, machine: str) -> str:
    """The cgroup of a machine as kubelet's `cgroupRoot` names it."""
    return f"/{cluster.cgroup}/{machine}"


def make(cluster: Cluster) -> None:
    for hierarchy in _hierarchies():
        for group in (cluster.cgroup, *(f"{cluster.cgroup}/{node}" for node in cluster.nodes)):
            directory = hierarchy / group
            directory.mkdir(exist_ok=True)
            if unified():
                controllers = (directory.parent / "cgroup.controllers").read_text().split()
                (directory.parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
            elif (directory / "cpuset.cpus").exists():
                for setting in (
                    "cpuset.cpus",
                    "cpuset.mems",
                ):  # v1 starts a new cpuset empty, and then nothing may join it
                    (directory / setting).write_text((hierarchy / setting).read_text())
        for setting, weight in WEIGHTS.items():
            if (path := hierarchy / cluster.cgroup / setting).exists():
                path.write_text(weight)


def remove(cluster: Cluster, *, seconds: float = 30) -> list[Path]:
    """Remove the cluster's groups as their last processes end; returns those that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [path for path in _groups(cluster) if not _removed(path)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _hierarchies() -> list[Path]:
    if unified():
        return [ROOT]
    return [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def _groups(cluster: Cluster) -> list[Path]:
    return [path for hierarchy in _hierarchies() if (path := hierarchy / cluster.cgroup).exists()]


def _removed(group: Path) -> bool:
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):  # busy while a process of it still ends
            os.rmdir(directory)
    return not group.exists()
