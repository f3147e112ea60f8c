"""The two-node cluster with this checkout installed and the workshop's workloads in it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.clusters import lifecycle
from hack.clusters.cluster import Cluster, valid_name
from hack.clusters.install import install
from hack.clusters.kubectl import Kubectl
from hack.clusters.workloads import deploy

EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    """The cluster named by $KUBEPCAP_CLUSTER, `e2e-test` by default, started for this run unless --keep left it up."""
    name = valid_name(os.environ.get("KUBEPCAP_CLUSTER") or "e2e-test")
    keep = pytestconfig.getoption("--keep")
    if not keep:
        lifecycle.down(name)
    cluster = lifecycle.up(name)
    try:
        install(cluster)
        deploy(Kubectl(cluster.kubeconfig))
        yield cluster
    finally:
        if not keep:
            lifecycle.down(name)


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """kubectl as the cluster's admin, or as `user=`."""
    return Kubectl(cluster.kubeconfig)


@pytest.fixture(scope="session")
def examples(kubectl: Kubectl) -> Path:
    """The folder of examples; its RBAC is applied."""
    kubectl("apply", f"--filename={EXAMPLES / 'rbac.yaml'}")
    return EXAMPLES
