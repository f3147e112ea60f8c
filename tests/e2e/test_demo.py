"""The README's first command tells its whole story, and leaves the cluster as it was told to."""

import os
import subprocess
from pathlib import Path

from hack.clusters.cluster import Cluster
from hack.clusters.kubectl import Kubectl

DEMO = Path(__file__).parents[2] / "hack" / "demo"


def test_the_demo_tells_its_story_to_the_end(cluster: Cluster, kubectl: Kubectl) -> None:
    environment = os.environ | {"KUBEPCAP_CLUSTER": cluster.name}
    told = subprocess.run(
        [DEMO, "--keep"], env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    assert f"export KUBECONFIG={cluster.kubeconfig}" in told.stdout
    assert kubectl.json("get", "packetcaptures", "--all-namespaces")["items"] == []
