"""What the manifests promise of every pod: no right that it does not need."""

from pathlib import Path
from typing import Any

import pytest
import yaml

MANIFESTS = Path(__file__).parents[2] / "manifests"
PROGRAMS = ("apiserver", "webhook", "controller", "agent")


def workload(program: str) -> dict[str, Any]:
    """The Deployment or DaemonSet of a program."""
    documents = yaml.safe_load_all((MANIFESTS / f"{program}.yaml").read_text())
    (found,) = (document for document in documents if document["kind"] in ("Deployment", "DaemonSet"))
    assert isinstance(found, dict)
    return found


def pod(program: str) -> dict[str, Any]:
    spec = workload(program)["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


CONTAINERS = [
    pytest.param(program, container, id=f"{program}/{container['name']}")
    for program in PROGRAMS
    for container in pod(program)["containers"]
]


@pytest.mark.parametrize(("program", "container"), CONTAINERS)
def test_every_container_is_hardened(program: str, container: dict[str, Any]) -> None:
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"]["drop"] == ["ALL"]
    assert "privileged" not in context
    assert pod(program)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize(("program", "container"), CONTAINERS)
def test_only_the_capturer_is_root_and_has_capabilities(program: str, container: dict[str, Any]) -> None:
    context = pod(program)["securityContext"] | container["securityContext"]
    if container["name"] == "capturer":
        assert context["capabilities"]["add"] == ["NET_RAW", "SYS_ADMIN", "SYS_PTRACE"]
    else:
        assert "add" not in context["capabilities"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 65532


def test_the_capturer_has_neither_a_token_nor_a_port() -> None:
    spec = pod("agent")
    assert spec["automountServiceAccountToken"] is False
    (capturer,) = (container for container in spec["containers"] if container["name"] == "capturer")
    assert {mount["name"] for mount in capturer["volumeMounts"]} == {"files", "run"}
    assert "ports" not in capturer
    assert "hostNetwork" not in spec


@pytest.mark.parametrize(("program", "container"), CONTAINERS)
def test_every_server_has_probes(program: str, container: dict[str, Any]) -> None:
    if container["name"] != "capturer":
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize("program", ["apiserver", "webhook", "controller"])
def test_two_replicas_are_never_evicted_together(program: str) -> None:
    documents = list(yaml.safe_load_all((MANIFESTS / f"{program}.yaml").read_text()))
    (budget,) = (document["spec"] for document in documents if document["kind"] == "PodDisruptionBudget")
    assert workload(program)["spec"]["replicas"] == 2
    assert budget["minAvailable"] == 1
    assert budget["selector"] == workload(program)["spec"]["selector"]


def test_agents_run_on_every_node() -> None:
    assert pod("agent")["tolerations"] == [{"operator": "Exists"}]


def test_no_program_may_read_secrets_but_its_own() -> None:
    for program in PROGRAMS:
        for document in yaml.safe_load_all((MANIFESTS / f"{program}.yaml").read_text()):
            for rule in document.get("rules") or []:
                assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
                if "secrets" in rule["resources"] and rule["verbs"] != ["create"]:
                    assert document["kind"] == "Role"
                    assert set(rule["resourceNames"]) <= {"kubepcap-ca", "kubepcap-webhook-path"}
                    assert program == "controller" or rule["resourceNames"] == ["kubepcap-webhook-path"]
