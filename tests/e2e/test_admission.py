"""What may be captured: refused in one sentence, and nothing captured while no webhook stands guard."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import Capture, capturing, manifest, refused, until

CONFIGURATIONS = Path(__file__).parents[2] / "manifests" / "webhookconfigurations.yaml"
NGINX = 'app == "nginx"'
RBAC = "rbac.authorization.k8s.io/v1"
UNGOVERNED = {"name": "without-policy", "namespace": "hipstershop"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"selector": "app = 'nginx'"}, "spec: selector: column 5: unexpected character '='"),
        (
            {"selector": NGINX, "filters": [{"protocol": "TCP", "ports": [70000]}]},
            "spec.filters[0].ports[0]: 70000 is no port: ports go from 1 to 65535",
        ),
        ({"selector": NGINX, "podSelector": {}}, "give exactly one of selector and podSelector"),
        (
            {"selector": NGINX, "startTime": "2030-01-01T10:00:00Z", "endTime": "2030-01-01T09:00:00Z"},
            "endTime must be after startTime",
        ),
        (
            {"selector": NGINX, "startTime": "9999-12-31T10:00:00Z", "endTime": "9999-12-31T23:00:00Z"},
            "spec.startTime: give a time between the years 1970 and 9000",
        ),
        (
            {"selector": "all()"},
            "policy baseline: the selector takes pods without any label too: select by a label that they have",
        ),
        (
            {"selector": NGINX, "rotation": {"maxFiles": 100}},
            "policy baseline: rotation.maxFiles is more than 10",
        ),
    ],
)
def test_what_may_not_be_captured_is_refused_in_one_sentence_also_on_dry_run(
    kubectl: Kubectl, examples: Path, spec: dict[str, Any], words: str
) -> None:
    given = manifest("refused", "dev", **spec)
    said = [
        refused(kubectl, "apply", f"--dry-run={dry_run}", "--filename=-", user="operator", given=given)
        for dry_run in ("none", "server")
    ]
    assert words in said[0]
    assert len(said[0].splitlines()) == 1
    assert said[0] == said[1]


def test_who_may_use_no_policy_is_refused(kubectl: Kubectl) -> None:
    # Captures, but `use` of no policy.
    rules = [{"apiGroups": ["kubepcap.io"], "resources": ["packetcaptures"], "verbs": ["*"]}]
    role = {"apiVersion": RBAC, "kind": "Role", "metadata": UNGOVERNED, "rules": rules}
    binding = {
        "apiVersion": RBAC,
        "kind": "RoleBinding",
        "metadata": UNGOVERNED,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": UNGOVERNED["name"]},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ungoverned"}],
    }
    for item in (role, binding):
        kubectl("apply", "--filename=-", input=json.dumps(item))
    given = manifest("refused", "hipstershop", selector='app == "frontend"')
    for dry_run in ("none", "server"):
        said = refused(kubectl, "apply", f"--dry-run={dry_run}", "--filename=-", user="ungoverned", given=given)
        assert "user ungoverned may use no CapturePolicy in namespace hipstershop (there are: baseline)" in said
        assert "ask for a RoleBinding to a role with verb use on capturepolicies" in said


def test_a_stamp_that_a_user_sends_is_not_taken(kubectl: Kubectl, examples: Path) -> None:
    given = json.loads(manifest("forged", "dev", selector=NGINX))
    given["metadata"]["annotations"] = {"kubepcap.io/admission": '{"user": "system:admin"}'}
    kubectl("apply", "--filename=-", input=json.dumps(given), user="operator")
    capture = Capture(kubectl, "dev", "forged")
    try:
        stamp = json.loads(capture.get()["metadata"]["annotations"]["kubepcap.io/admission"])
        assert (stamp["user"], stamp["policy"]) == ("operator", "baseline")
    finally:
        capture.delete()


def test_without_a_webhook_a_new_capture_captures_nothing_and_says_why(kubectl: Kubectl, without_webhook: None) -> None:
    with capturing(kubectl, "unguarded", "dev", selector=NGINX) as capture:
        status = capture.wait_for_phase("Error")
        admitted = capture.condition("Admitted")
        assert (admitted["status"], admitted["reason"]) == ("False", "NotStamped")
        assert "created while the admission webhook was not in place" in admitted["message"]
        assert not status.get("pods")
        kubectl("exec", "--namespace=dev", "netshoot", "--", "curl", "-sS", "-o", "/dev/null", "http://nginx-svc/")
        assert capture.files() == []


@pytest.fixture
def without_webhook(kubectl: Kubectl) -> Iterator[None]:
    """The webhook's configurations are deleted, and in place again afterwards."""
    kubectl("delete", f"--filename={CONFIGURATIONS}")
    _until_guarded(kubectl, guarded=False)
    yield
    kubectl("apply", f"--filename={CONFIGURATIONS}")
    _until_guarded(kubectl, guarded=True)


def _until_guarded(kubectl: Kubectl, *, guarded: bool) -> None:
    """kube-apiserver takes a moment to see each configuration go or come, and the controller to fill them in."""
    create = ("create", "--dry-run=server", "--filename=-", "--output=json")
    allowed = manifest("probe", "dev", selector=NGINX)
    denied = manifest("probe", "dev", selector=NGINX, rotation={"maxFiles": 100})

    def seen() -> bool:
        is_stamped = "kubepcap.io/admission" in kubectl(*create, input=allowed, check=False).stdout
        is_judged = "policy baseline" in kubectl(*create, input=denied, check=False).stderr
        return is_stamped is is_judged is guarded

    until("the webhook to be asked" if guarded else "the webhook not to be asked", seen)


def test_a_capture_that_runs_outlives_the_webhook(kubectl: Kubectl, request: pytest.FixtureRequest) -> None:
    with capturing(kubectl, "outliving", "dev", selector=NGINX) as capture:
        capture.wait_for_pods(2)
        request.getfixturevalue("without_webhook")
        kubectl("exec", "--namespace=dev", "netshoot", "--", "curl", "-sS", "-o", "/dev/null", "http://nginx-svc/")
        assert sum(file["packets"] for file in capture.files()) > 0
