"""Our kinds as kube-apiserver serves them: rules, defaults, words."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from api import stamp
from api.packetcapture import PacketCapture
from hack.clusters.bare import BareControlPlane

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
