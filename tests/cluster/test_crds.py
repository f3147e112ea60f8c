"""Our kinds as kube-apiserver serves them: rules, defaults, words."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from api import stamp
from api.capturenode import NodeCapture
from api.packetcapture import PacketCapture
from hack.clusters.bare import BareControlPlane
from tests.cluster.conftest import CRDS

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def kubectl(crds: BareControlPlane) -> Kubectl:
    def run(*arguments: str, given: object = None) -> "subprocess.CompletedProcess[str]":
        command = [str(crds.kubectl), f"--kubeconfig={crds.kubeconfig}", *arguments]
        text = None if given is None else json.dumps(given)
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    return run


def capture(spec: dict[str, Any], name: str = "sample") -> dict[str, Any]:
    return {
        "apiVersion": "kubepcap.io/v1",
        "kind": "PacketCapture",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "spec: Invalid value: give exactly one of selector and podSelector"),
        (
            {"selector": "has(a)", "podSelector": {}},
            "spec: Invalid value: give exactly one of selector and podSelector",
        ),
        (
            {"selector": "has(a)", "startTime": "2026-12-01T10:00:00Z", "endTime": "2026-12-01T10:00:00Z"},
            "spec.endTime: Invalid value: endTime must be after startTime",
        ),
        (
            {"selector": "has(a)", "snapLength": 1},
            "spec.snapLength: Invalid value: 1: spec.snapLength in body should be",
        ),
        ({"selector": "has(a)", "rotation": {"maxFileSize": "10MB"}}, "spec.rotation.maxFileSize"),
    ],
)
def test_a_spec_that_breaks_a_rule_is_refused_also_on_dry_run(
    kubectl: Kubectl, spec: dict[str, Any], message: str
) -> None:
    for dry_run in ("none", "server"):
        refused = kubectl("apply", f"--dry-run={dry_run}", "--filename=-", given=capture(spec))
        assert refused.returncode == 1
        assert message in refused.stderr


def test_defaults_that_kube_apiserver_fills_in_keep_the_hash(kubectl: Kubectl) -> None:
    given = capture({"selector": "has(a)", "rotation": {}}, name="defaults")
    assert kubectl("apply", "--filename=-", given=given).returncode == 0
    stored = json.loads(kubectl("get", "packetcapture", "defaults", "--output=json").stdout)
    assert stored["spec"]["rotation"] == {"maxFileSize": 10_000_000, "maxFiles": 2}
    assert stored["spec"]["snapLength"] == 262144
    spec = PacketCapture.model_validate(given).spec
    assert stamp.spec_hash(PacketCapture.model_validate(stored).spec) == stamp.spec_hash(spec)


def test_short_names_and_columns(kubectl: Kubectl) -> None:
    assert kubectl("apply", "--filename=-", given=capture({"selector": "has(a)"}, name="columns")).returncode == 0
    table = kubectl("get", "pcap", "columns").stdout.splitlines()
    assert table[0].split() == ["NAME", "PHASE", "PODS", "PACKETS", "SIZE", "DROPPED", "AGE"]


def test_status_is_a_subresource(kubectl: Kubectl) -> None:
    given = capture({"selector": "has(a)"}, name="status") | {"status": {"pods": 3}}
    assert kubectl("apply", "--filename=-", given=given).returncode == 0
    assert "status" not in json.loads(kubectl("get", "pcap", "status", "--output=json").stdout)
    patched = kubectl(
        "patch", "pcap", "status", "--subresource=status", "--type=merge", '--patch={"status":{"pods":3}}'
    )
    assert patched.returncode == 0
    assert json.loads(kubectl("get", "pcap", "status", "--output=json").stdout)["status"]["pods"] == 3


def test_explain_reads_well(kubectl: Kubectl) -> None:
    words = " ".join(kubectl("explain", "packetcapture.spec.filters").stdout.split())
    assert "Packets of one protocol, on one of these ports." in words
    assert "TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite, or a number from 1 to 255." in words


def test_a_policy_is_filled_with_safe_defaults(kubectl: Kubectl) -> None:
    policy = {
        "apiVersion": "kubepcap.io/v1",
        "kind": "CapturePolicy",
        "metadata": {"name": "p"},
        "spec": {"limits": {}, "selectors": {}},
    }
    # Not stored: the webhook's tests count the policies of this API server.
    dry_run = ["create", "--dry-run=server", "--output=json", "--filename=-"]
    stored = json.loads(kubectl(*dry_run, given=policy).stdout)["spec"]
    assert stored["limits"]["maxDuration"] == "1h0m0s"
    assert stored["selectors"]["allowEmpty"] is False


def test_a_node_that_an_earlier_release_wrote_is_written_again(guarded_plane: BareControlPlane) -> None:
    """Until v0.1.0 the captures of a node were objects, under another name."""
    kubectl = [str(guarded_plane.kubectl), f"--kubeconfig={guarded_plane.kubeconfig}"]

    def run(*arguments: str, given: object = None) -> None:
        text = None if given is None else json.dumps(given)
        done = subprocess.run([*kubectl, *arguments], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def node(**status: object) -> dict[str, object]:
        return {
            "apiVersion": "kubepcap.io/v1",
            "kind": "CaptureNode",
            "metadata": {"name": "upgraded"},
            "status": status,
        }

    definition = yaml.safe_load((CRDS / "capturenodes.yaml").read_text())
    properties = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    del properties["reports"]
    properties["captures"] = {"type": "array", "items": {"type": "object", "properties": {"uid": {"type": "string"}}}}
    write = ["apply", "--server-side", "--force-conflicts", "--field-manager=kubepcap-agent", "--filename=-"]
    run("apply", "--filename=-", given=definition)
    run("wait", "--for=condition=Established", "crd/capturenodes.kubepcap.io", "--timeout=30s")
    run(*write, given=node(captures=[{"uid": "u"}]))
    run("apply", f"--filename={CRDS / 'capturenodes.yaml'}")
    run("wait", "--for=condition=Established", "crd/capturenodes.kubepcap.io", "--timeout=30s")
    report = NodeCapture(namespace="dev", name="c", uid="u", state="Capturing").written()
    deadline = time.monotonic() + 30
    while True:  # until kube-apiserver serves the new schema
        run(*write, "--validate=false", given=node(reports=[report]))
        answer = subprocess.run(
            [*kubectl, "get", "capturenode", "upgraded", "--output=json"], capture_output=True, check=True
        )
        if (status := json.loads(answer.stdout)["status"]).get("reports") == [report]:
            break
        assert time.monotonic() < deadline, status
    assert "captures" not in status
