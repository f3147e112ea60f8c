"""The admission policies in manifests/: whose object an agent may write, and who writes status."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hack.clusters.bare import BareControlPlane

MANIFESTS = Path(__file__).parents[2] / "manifests"
AGENT = "system:serviceaccount:kubepcap:kubepcap-agent"
CONTROLLER = "system:serviceaccount:kubepcap:kubepcap-controller"
NODE_NAME = "authentication.kubernetes.io/node-name"

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def kubectl(guarded_plane: BareControlPlane) -> Kubectl:
    """kubectl as a cluster administrator, or as another user who may do anything that RBAC can allow."""

    def run(
        *arguments: str, user: str = "", node: str = "", given: object = None
    ) -> "subprocess.CompletedProcess[str]":
        command = [str(guarded_plane.kubectl), f"--kubeconfig={guarded_plane.kubeconfig}", *arguments]
        if user:
            command += [f"--as={user}", "--as-group=system:masters"]
        if node:
            command.append(f"--as-user-extra={NODE_NAME}={node}")
        text = None if given is None else json.dumps(given)
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    applied = run("apply", f"--filename={MANIFESTS / 'admissionpolicies.yaml'}")
    assert applied.returncode == 0, applied.stderr
    assert run("apply", "--filename=-", given=capture("guarded")).returncode == 0
    _until_enforced(run)
    return run


def capture_node(name: str) -> dict[str, object]:
    return {"apiVersion": "kubepcap.io/v1", "kind": "CaptureNode", "metadata": {"name": name}}


def capture(name: str) -> dict[str, object]:
    return {
        "apiVersion": "kubepcap.io/v1",
        "kind": "PacketCapture",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": "has(a)"},
    }


def status_patch(name: str) -> tuple[str, ...]:
    return ("patch", f"packetcapture/{name}", "--subresource=status", "--type=merge", '--patch={"status":{"pods":1}}')


def _until_enforced(run: Kubectl) -> None:
    """kube-apiserver takes a moment to compile policies, each for itself; until then nothing is refused."""
    deadline = time.monotonic() + 30
    applying = ("apply", "--dry-run=server", "--filename=-")
    while (
        run(*applying, given=capture_node("probe"), user=AGENT).returncode == 0
        or run(*status_patch("guarded"), "--dry-run=server").returncode == 0
    ):
        assert time.monotonic() < deadline, "the policies are not enforced"
        time.sleep(0.1)


def refused(answer: "subprocess.CompletedProcess[str]", words: str) -> bool:
    return answer.returncode != 0 and "Forbidden" in answer.stderr and words in answer.stderr


def test_an_agent_writes_the_object_of_its_own_node(kubectl: Kubectl) -> None:
    created = kubectl("apply", "--server-side", "--filename=-", given=capture_node("own"), user=AGENT, node="own")
    assert created.returncode == 0, created.stderr
    changed = kubectl("annotate", "capturenode/own", "a=b", user=AGENT, node="own")
    assert changed.returncode == 0, changed.stderr


@pytest.mark.parametrize("server_side", ["--server-side", "--server-side=false"])
def test_an_agent_does_not_create_the_object_of_another_node(kubectl: Kubectl, server_side: str) -> None:
    answer = kubectl("apply", server_side, "--filename=-", given=capture_node("other"), user=AGENT, node="own")
    assert refused(answer, "an agent may write the CaptureNode of its own node alone")


def test_an_agent_does_not_change_the_object_of_another_node(kubectl: Kubectl) -> None:
    assert kubectl("apply", "--filename=-", given=capture_node("third")).returncode == 0
    answer = kubectl("annotate", "capturenode/third", "a=b", user=AGENT, node="own")
    assert refused(answer, "an agent may write the CaptureNode of its own node alone")


def test_a_token_that_names_no_node_writes_nothing(kubectl: Kubectl) -> None:
    answer = kubectl("apply", "--filename=-", given=capture_node("nobody"), user=AGENT)
    assert refused(answer, "the agent's token names no node")


@pytest.mark.parametrize("what", [["capturenode/doomed"], ["capturenodes", "--all"]])
def test_an_agent_deletes_nothing(kubectl: Kubectl, what: Sequence[str]) -> None:
    assert kubectl("apply", "--filename=-", given=capture_node("doomed")).returncode == 0
    answer = kubectl("delete", *what, "--wait=false", user=AGENT, node="doomed")
    assert refused(answer, "an agent may not delete a CaptureNode")


def test_the_controller_alone_writes_the_status_of_captures(kubectl: Kubectl) -> None:
    patch = status_patch("guarded")
    for user in ("", AGENT, "alice"):
        assert refused(kubectl(*patch, user=user), "the status of a capture is written by kubepcap's controller alone")
    assert kubectl(*patch, user=CONTROLLER).returncode == 0
