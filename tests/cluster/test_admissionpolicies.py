"""The policies in manifests/: whose object an agent may write, who writes status, what the controller may change."""

import base64
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hack.clusters.bare import BareControlPlane

MANIFESTS = Path(__file__).parents[2] / "manifests"
AGENT = "system:serviceaccount:kubepcap:kubepcap-agent"
CONTROLLER = "system:serviceaccount:kubepcap:kubepcap-controller"
APISERVICE = "apiservice/v1.subresources.kubepcap.io"
MUTATING = "mutatingwebhookconfiguration/kubepcap"
VALIDATING = "validatingwebhookconfiguration/kubepcap"
UNGUESSABLE = "0123456789abcdef" * 2
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
    for manifest in ("apiservice.yaml", "webhookconfigurations.yaml"):
        assert run("apply", f"--filename={MANIFESTS / manifest}").returncode == 0
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
        or run("label", APISERVICE, "a=b", "--dry-run=server", user=CONTROLLER).returncode == 0
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


def patched(*changes: tuple[str, Any]) -> tuple[str, ...]:
    """Options of `kubectl patch` that set fields; None removes one."""
    operations = [
        {"op": "remove", "path": path} if value is None else {"op": "add", "path": path, "value": value}
        for path, value in changes
    ]
    return "--type=json", f"--patch={json.dumps(operations)}"


@pytest.fixture(scope="module")
def bundle(guarded_plane: BareControlPlane) -> str:
    return base64.b64encode(guarded_plane.authority.certificate).decode()


def test_the_controller_puts_the_ca_where_kube_apiserver_looks(kubectl: Kubectl, bundle: str) -> None:
    for given in (bundle, base64.b64encode(base64.b64decode(bundle) * 2).decode()):
        answer = kubectl("patch", APISERVICE, *patched(("/spec/caBundle", given)), user=CONTROLLER)
        assert answer.returncode == 0, answer.stderr
        for configuration, half in ((MUTATING, "stamp"), (VALIDATING, "judge")):
            address = "/webhooks/0/clientConfig"
            change = patched((f"{address}/caBundle", given), (f"{address}/service/path", f"/{half}/{UNGUESSABLE}"))
            answer = kubectl("patch", configuration, *change, user=CONTROLLER)
            assert answer.returncode == 0, answer.stderr


METADATA = {
    "labels": {"a": "b"},
    "annotations": {"a": "b"},
    "finalizers": ["a.example/b"],
    "ownerReferences": [{"apiVersion": "v1", "kind": "Namespace", "name": "default", "uid": "u"}],
}


@pytest.mark.parametrize("target", [APISERVICE, MUTATING, VALIDATING])
@pytest.mark.parametrize("field", METADATA)
def test_the_controller_changes_no_metadata(kubectl: Kubectl, target: str, field: str) -> None:
    for value in (METADATA[field], {} if isinstance(METADATA[field], dict) else []):
        if field == "labels" or value:  # those alone are there to be removed
            answer = kubectl("patch", target, *patched((f"/metadata/{field}", value)), user=CONTROLLER)
            assert refused(answer, "may change nothing here but the CA and the webhook's path")


# Group and version are in the name, and so can't be changed by anyone.
SPEC: dict[str, list[tuple[str, Any]]] = {
    "groupPriorityMinimum": [("/spec/groupPriorityMinimum", 2000)],
    "versionPriority": [("/spec/versionPriority", 1)],
    "insecureSkipTLSVerify": [("/spec/insecureSkipTLSVerify", True), ("/spec/caBundle", None)],
    "service": [("/spec/service/name", "another")],
    "service's namespace": [("/spec/service/namespace", "default")],
    "service's port": [("/spec/service/port", 8443)],
    "service removed": [("/spec/service", None), ("/spec/caBundle", None)],
}


@pytest.mark.parametrize("field", SPEC)
def test_the_controller_changes_nothing_else_of_an_apiservice(kubectl: Kubectl, bundle: str, field: str) -> None:
    kubectl("patch", APISERVICE, *patched(("/spec/caBundle", bundle)))
    answer = kubectl("patch", APISERVICE, *patched(*SPEC[field]), user=CONTROLLER)
    assert refused(answer, "may change nothing of an APIService but caBundle")


SERVICE = {"name": "kubepcap-webhook", "namespace": "kubepcap", "port": 443, "path": f"/stamp/{UNGUESSABLE}"}
WEBHOOK: dict[str, Any] = {
    "name": "another.kubepcap.io",
    "rules": [],
    "failurePolicy": "Ignore",
    "matchPolicy": "Exact",
    "namespaceSelector": {"matchLabels": {"a": "b"}},
    "objectSelector": {"matchLabels": {"a": "b"}},
    "sideEffects": "NoneOnDryRun",
    "timeoutSeconds": 1,
    "admissionReviewVersions": ["v1", "v1beta1"],
    "matchConditions": [{"name": "never", "expression": "false"}],
    "reinvocationPolicy": "Never",
    "clientConfig": {"url": "https://webhook.example/stamp"},
    "clientConfig/service/name": "another",
    "clientConfig/service/namespace": "default",
    "clientConfig/service/port": 8443,
    "clientConfig/service/path": "/judge/" + UNGUESSABLE,
    "clientConfig/service/path, short": "/stamp/0123",
    "clientConfig/service/path, deep": f"/stamp/{UNGUESSABLE}/x",
}


@pytest.mark.parametrize("field", WEBHOOK)
@pytest.mark.parametrize("configuration", [MUTATING, VALIDATING])
def test_the_controller_changes_nothing_else_of_a_webhook(kubectl: Kubectl, configuration: str, field: str) -> None:
    value, half = WEBHOOK[field], "stamp" if configuration == MUTATING else "judge"
    if field.startswith("clientConfig/service/path"):
        value = value.replace("/judge/", "/another/").replace("/stamp/", f"/{half}/")
    change = patched((f"/webhooks/0/{field.partition(',')[0]}", value))
    answer = kubectl("patch", configuration, *change, user=CONTROLLER)
    if (configuration, field) == (VALIDATING, "reinvocationPolicy"):
        assert "unknown field" in answer.stderr
    else:
        assert refused(answer, "may change nothing of a webhook but caBundle and its path")


def test_the_tables_name_every_field_there_is(kubectl: Kubectl) -> None:
    definitions = json.loads(kubectl("get", "--raw", "/openapi/v2").stdout)["definitions"]
    webhook = definitions["io.k8s.api.admissionregistration.v1.MutatingWebhook"]["properties"]
    spec = definitions["io.k8s.kube-aggregator.pkg.apis.apiregistration.v1.APIServiceSpec"]["properties"]
    assert webhook.keys() - WEBHOOK.keys() == set()
    assert spec.keys() - SPEC.keys() == {"caBundle", "group", "version"}


@pytest.mark.parametrize("configuration", [MUTATING, VALIDATING])
def test_the_controller_adds_and_removes_no_webhook(kubectl: Kubectl, configuration: str) -> None:
    (webhook,) = json.loads(kubectl("get", configuration, "--output=json").stdout)["webhooks"]
    for webhooks in ([], [webhook, webhook | {"name": "second.kubepcap.io"}]):
        answer = kubectl("patch", configuration, *patched(("/webhooks", webhooks)), user=CONTROLLER)
        assert refused(answer, "kubepcap's controller may change nothing")


@pytest.mark.parametrize("target", [APISERVICE, MUTATING, VALIDATING])
def test_the_controller_neither_creates_nor_deletes_what_trusts_it(kubectl: Kubectl, target: str) -> None:
    words = "may neither create nor delete this, nor write its status"
    assert refused(kubectl("delete", target, "--wait=false", user=CONTROLLER), words)
    kind = target.partition("/")[0]
    assert refused(kubectl("delete", kind, "--all", "--wait=false", user=CONTROLLER), words)
    found = json.loads(kubectl("get", target, "--output=json").stdout)
    other = {key: found[key] for key in ("apiVersion", "kind", "spec", "webhooks") if key in found}
    name = "v2.subresources.kubepcap.io" if target == APISERVICE else "another"
    if target == APISERVICE:
        other["spec"]["version"] = "v2"
    created = kubectl("create", "--filename=-", given=other | {"metadata": {"name": name}}, user=CONTROLLER)
    assert refused(created, words)


def test_the_controller_writes_no_status_of_an_apiservice(kubectl: Kubectl) -> None:
    change = ("--subresource=status", "--type=merge", '--patch={"status":{"conditions":[]}}')
    answer = kubectl("patch", APISERVICE, *change, user=CONTROLLER)
    assert refused(answer, "nor write its status")


def test_the_controller_changes_no_object_that_is_not_ours(kubectl: Kubectl, bundle: str) -> None:
    webhooks = json.loads(kubectl("get", VALIDATING, "--output=json").stdout)["webhooks"]
    webhooks[0]["rules"][0]["apiGroups"] = ["none.example"]
    theirs = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "theirs"},
        "webhooks": webhooks,
    }
    assert kubectl("apply", "--filename=-", given=theirs).returncode == 0
    change = patched(("/webhooks/0/clientConfig/caBundle", bundle))
    words = "may change no other object than kubepcap's own"
    assert refused(kubectl("patch", "validatingwebhookconfiguration/theirs", *change, user=CONTROLLER), words)
    change = patched(("/spec/versionPriority", 1))
    assert refused(kubectl("patch", "apiservice/v1.apps", *change, user=CONTROLLER), words)


@pytest.mark.parametrize("user", ["", "alice", "system:serviceaccount:kubepcap:kubepcap-webhook"])
def test_others_change_what_they_may(kubectl: Kubectl, user: str) -> None:
    changes = [
        (APISERVICE, patched(("/spec/versionPriority", 99))),
        (APISERVICE, patched(("/metadata/annotations", {"by": user}))),
        (MUTATING, patched(("/webhooks/0/timeoutSeconds", 4))),
        (VALIDATING, patched(("/webhooks/0/clientConfig/service/path", "/judge/simple"))),
    ]
    for target, change in changes:
        answer = kubectl("patch", target, *change, "--dry-run=server", user=user)
        assert answer.returncode == 0, answer.stderr
