"""The shell commands in README.md and CONTRIBUTING.md work when they are pasted, one after the other.

The README's two commands are `hack/demo`, run by test_demo.py, and `hack/test`, which runs this.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from hack.clusters.binaries import find
from hack.clusters.cluster import Cluster
from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import until

PROJECT = Path(__file__).parents[2]
ELSEWHERE = {
    "kubectl delete -k manifests/": "test_uninstall.py",
    "hack/cluster down": "every run's end, and tests/hack",
}


def blocks(document: str) -> list[str]:
    """The document's shell commands, without those that another test runs."""
    text = (PROJECT / document).read_text()
    found = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{document} has no commands"
    lines = ("\n".join(line for line in block.splitlines() if line not in ELSEWHERE) for block in found)
    return [block for block in lines if block]


def run(block: str, cluster: Cluster, *, directory: Path) -> str:
    environment = os.environ | {
        "KUBECONFIG": str(cluster.kubeconfig),
        "KUBEPCAP_CLUSTER": cluster.name,
        "PATH": f"{find('kubectl').parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_five_minutes_of_the_readme(kubectl: Kubectl, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "manifests").symlink_to(PROJECT / "manifests")
    printed = ""
    for block in blocks("README.md"):
        printed += run(block, cluster, directory=tmp_path)
        if "apply -f manifests/examples/nginx-pcap.yaml" in block:
            kubectl("exec", "--namespace=dev", "netshoot", "--", "curl", "-sS", "-o", "/dev/null", "http://nginx-svc/")
    assert len(list(tmp_path.glob("*.pcap"))) == 2
    assert "Flags [S]" in printed, "tcpdump shows the connection"
    assert "PacketCaptureFileList" in printed
    until("the capture to go", lambda: "nginx-pcap" not in kubectl("get", "pcap", "--namespace=dev").stdout)


@pytest.mark.parametrize("block", blocks("CONTRIBUTING.md"), ids=lambda block: block.split("\n", 1)[0])
def test_the_commands_for_developers(cluster: Cluster, block: str) -> None:
    run(block, cluster, directory=PROJECT)
