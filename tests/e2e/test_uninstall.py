"""`kubectl delete -k manifests/` leaves nothing in the cluster, and what is installed again works."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.clusters.cluster import Cluster
from hack.clusters.install import install
from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import Capture, manifest, until

MANIFESTS = Path(__file__).parents[2] / "manifests"


@pytest.fixture
def uninstalled(kubectl: Kubectl, cluster: Cluster) -> Iterator[None]:
    """Removed while a capture runs, and installed again afterwards."""
    kubectl("apply", "--filename=-", input=manifest("left-behind", "dev", selector='app == "nginx"'))
    Capture(kubectl, "dev", "left-behind").wait_for_pods(2)
    kubectl("delete", f"--kustomize={MANIFESTS}", "--timeout=90s")
    yield
    install(cluster)


def test_uninstalling_leaves_nothing_in_the_cluster(kubectl: Kubectl, uninstalled: None) -> None:
    until("everything to be gone", lambda: not left(kubectl) or None)
    # A namespace can be deleted, which a dead APIService would prevent.
    kubectl("create", "namespace", "brief")
    kubectl("delete", "namespace", "brief", "--timeout=60s")


def left(kubectl: Kubectl) -> list[str]:
    """Objects of any kind that are named after the project or lie in its namespace."""
    kinds = kubectl("api-resources", "--verbs=list", "--output=name").stdout.split()
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    names = '{range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\\n"}{end}'
    listed = kubectl("get", ",".join(kinds), "--all-namespaces", f"--output=jsonpath={names}").stdout
    return [line for line in listed.splitlines() if re.search(r"kubepcap", line)]
