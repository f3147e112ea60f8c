"""A real kube-apiserver for each test run: etcd beside it, on loopback, in about four seconds."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hack.clusters.bare import BareControlPlane, bare_control_plane
from kube.client import PACKETCAPTURES
from tests.agent.world import Capturer, make_pod
from tests.cluster.world import World, node

CRDS = Path(__file__).parents[2] / "manifests" / "crds"


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    """etcd and kube-apiserver, with RBAC and a front proxy, and nothing else."""
    with bare_control_plane(tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture(scope="session")
def crds(control_plane: BareControlPlane) -> BareControlPlane:
    """The same control plane, knowing our kinds."""
    teach(control_plane)
    return control_plane


def teach(plane: BareControlPlane) -> None:
    """Let a control plane know our kinds."""
    kubectl = [str(plane.kubectl), f"--kubeconfig={plane.kubeconfig}"]
    subprocess.run([*kubectl, "apply", f"--filename={CRDS}"], check=True, capture_output=True)
    established = ["wait", "--for=condition=Established", f"--filename={CRDS}", "--timeout=30s"]
    subprocess.run([*kubectl, *established], check=True, capture_output=True)


@pytest.fixture(scope="module")
def guarded_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    """A control plane of a module's own that knows our kinds: what it enforces is in no other test's way."""
    with bare_control_plane(tmp_path_factory.mktemp("guarded-plane")) as plane:
        teach(plane)
        yield plane


@pytest.fixture
async def cluster(crds: BareControlPlane, tmp_path: Path) -> AsyncIterator[World]:
    """A node whose agent runs."""
    with make_pod() as pod:
        capturer = Capturer(tmp_path)
        async with node(crds, tmp_path, pod=pod, capturer=capturer) as made:
            await made.start_agent()
            yield made
            if made.process.returncode is None:
                assert await made.stop_agent() == 0
            for item in (await made.client.list(PACKETCAPTURES, namespace=made.namespace)).items:
                await made.client.delete(PACKETCAPTURES, item["metadata"]["name"], namespace=made.namespace)
        made.capturer.close()
