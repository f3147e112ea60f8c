"""What the manifests ask of an overloaded kube-apiserver."""

from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).parents[2] / "manifests"


def documents(kind: str) -> dict[str, dict[str, Any]]:
    """Those of the kind, by name."""
    found = yaml.safe_load_all((MANIFESTS / "flowcontrol.yaml").read_text())
    return {each["metadata"]["name"]: each["spec"] for each in found if each["kind"] == kind}


def test_every_flow_is_of_an_account_of_ours_and_has_a_level() -> None:
    accounts = set()
    for path in MANIFESTS.glob("*.yaml"):
        for each in yaml.safe_load_all(path.read_text()):
            if each["kind"] == "ServiceAccount":
                accounts.add((each["metadata"]["name"], each["metadata"]["namespace"]))
    levels = documents("PriorityLevelConfiguration").keys() | {"leader-election"}
    for flow in documents("FlowSchema").values():
        assert flow["priorityLevelConfiguration"]["name"] in levels
        for rule in flow["rules"]:
            for subject in rule["subjects"]:
                account = subject["serviceAccount"]
                assert (account["name"], account["namespace"]) in accounts


def test_agents_that_all_report_at_once_wait_and_are_not_refused() -> None:
    level = documents("PriorityLevelConfiguration")["kubepcap-reports"]["limited"]
    assert level["limitResponse"]["type"] == "Queue"
    assert level["limitResponse"]["queuing"]["queueLengthLimit"] >= 1000
    assert level["nominalConcurrencyShares"] <= 10
