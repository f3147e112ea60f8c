"""A capture says what it sees, what it does not, and why, in its conditions and in Events."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hack.clusters.cluster import Cluster
from hack.clusters.keeper import entering
from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import Capture, capturing, manifest, refused, until

CATALOGUE = 'app == "productcatalogservice"'


def test_a_filter_that_matches_nothing_is_told_with_what_the_interfaces_saw(kubectl: Kubectl) -> None:
    filters = [{"protocol": "TCP", "ports": [4]}]
    # The shop's front end asks the catalogue once a second, on another port.
    with capturing(kubectl, "deaf", "hipstershop", selector=CATALOGUE, filters=filters) as capture:
        said = until("the reason", lambda: _condition(capture, "Capturing", reason="FilterMatchedNothing"))
        assert re.search(r"filter matched 0 of [\d,]+ packets seen on 1 pod", said["message"])
        assert capture.status()["phase"] == "WaitingForTraffic"
        assert _condition(capture, "PodsMatched", status="True")
        assert _condition(capture, "Complete", status="Unknown")
        assert _condition(capture, "Degraded", status="False")


def test_events_tell_each_change_once_and_who_began(kubectl: Kubectl) -> None:
    with capturing(kubectl, "told", "hipstershop", selector=CATALOGUE) as capture:
        capture.wait_for_phase("Capturing")
        kubectl("patch", "pcap", "told", "--namespace=hipstershop", "--type=merge", '--patch={"spec":{"suspend":true}}')
        capture.wait_for_phase("Scheduled")
        events = until("both events", lambda: found if len(found := _events(kubectl, capture)) >= 2 else None)
        assert {event["reason"] for event in events} >= {"Started", "Suspended"}
        assert len({(event["reason"], event["message"]) for event in events}) == len(events)
        (started,) = (event for event in events if event["reason"] == "Started")
        assert "kubernetes-admin" in started["message"] or "admin" in started["message"]
        described = kubectl("describe", "packetcapture", "told", "--namespace=hipstershop").stdout
        assert "Started" in described


def test_the_loopback_is_captured_on_request_only_and_where_a_policy_names_it(kubectl: Kubectl) -> None:
    spec = {"selector": 'app == "netshoot"', "interfaces": ["lo"]}
    given = manifest("inside", "dev", **spec)
    assert "interface lo" in refused(kubectl, "apply", "--filename=-", given=given)
    with (
        _policy(kubectl, "loopback", interfaces={"allowed": ["lo"]}),
        capturing(kubectl, "inside", "dev", selector='app == "netshoot"', interfaces=["lo"]) as inside,
        capturing(kubectl, "outside", "dev", selector='app == "netshoot"') as outside,
    ):
        inside.wait_for_pods(1)
        outside.wait_for_pods(1)
        kubectl("exec", "--namespace=dev", "netshoot", "--", "ping", "-c3", "127.0.0.1")
        (file,) = until("the packets", lambda: [file for file in inside.files() if file["packets"] >= 6])
        assert (file["interface"], file["packets"], file["received"], file["dropped"]) == ("lo", 6, 6, 0)
        assert {file["interface"] for file in outside.files()} == {"eth0"}


def test_a_worker_that_is_killed_is_back_and_the_gap_is_told(kubectl: Kubectl, cluster: Cluster) -> None:
    with capturing(kubectl, "cut", "hipstershop", selector=CATALOGUE) as capture:
        capture.wait_for_phase("Capturing")
        (node,) = {file["node"] for file in capture.files()}
        before = capture.files()
        _kill_worker(cluster, node)
        said = until("the interruption", lambda: _condition(capture, "Complete", reason="Interrupted"))
        assert node in said["message"]
        files = until("a file after it", lambda: found if len(found := capture.files()) > len(before) else None)
        assert files[0]["state"] == "Finished"
        assert until("packets in it", lambda: capture.files()[-1]["packets"])
        assert any(event["reason"] == "Interrupted" for event in _events(kubectl, capture))


@contextmanager
def _policy(kubectl: Kubectl, name: str, **spec: Any) -> Iterator[None]:
    policy = {"apiVersion": "kubepcap.io/v1", "kind": "CapturePolicy", "metadata": {"name": name}, "spec": spec}
    kubectl("apply", "--filename=-", input=json.dumps(policy))
    try:
        yield
    finally:
        kubectl("delete", "capturepolicy", name)


def _condition(capture: Capture, kind: str, **values: str) -> dict[str, Any] | None:
    condition = capture.condition(kind)
    return condition if all(condition.get(key) == value for key, value in values.items()) else None


def _events(kubectl: Kubectl, capture: Capture) -> list[dict[str, Any]]:
    uid = capture.get()["metadata"]["uid"]
    selector = f"--field-selector=involvedObject.uid={uid}"
    listed: dict[str, Any] = kubectl.json("get", "events", f"--namespace={capture.namespace}", selector)
    found: list[dict[str, Any]] = listed["items"]
    return found


def _kill_worker(cluster: Cluster, node: str) -> None:
    listed = subprocess.run(
        [*entering(cluster, node), "pgrep", "--full", "agent.capturer.worker"],
        capture_output=True,
        text=True,
        check=True,
    )
    (worker,) = listed.stdout.split()
    subprocess.run([*entering(cluster, node), "kill", f"-{int(signal.SIGKILL)}", worker], check=True)
