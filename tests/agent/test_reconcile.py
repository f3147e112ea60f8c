"""What is captured, and why not the rest: tables over the pure plan."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent import reconcile
from agent.pods import Pod, parse_pod
from agent.reconcile import Capture, CapturePlan, Plan, Verdict, parse_capture
from api import stamp
from api.capturepolicy import Limits
from api.packetcapture import PacketCapture, PacketCaptureSpec

CREATED = datetime(2026, 12, 1, 10, tzinfo=UTC)
NOW = CREATED + timedelta(minutes=5)
CAPTURE_UID = "0f4b1a5e-8d0c-4f5a-9a53-1d2d7a3c9b11"
POD_UID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
ADMITTED = {"type": "Admitted", "status": "True", "reason": "Admitted", "lastTransitionTime": "2026-12-01T10:00:01Z"}


def capture(
    spec: dict[str, Any] | None = None,
    *,
    stamped: bool = True,
    conditions: list[dict[str, Any]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Capture:
    spec = {"selector": "app == 'web'"} | (spec or {})
    annotations = {}
    if stamped:
        given = stamp.Stamp(
            user="u",
            policy="baseline",
            limits=Limits(max_duration=timedelta(hours=1)),
            namespace="dev",
            spec_hash=stamp.spec_hash(PacketCaptureSpec.model_validate(spec)),
        )
        annotations[stamp.ANNOTATION] = given.to_annotation()
    return parse_capture(
        {
            "metadata": {
                "name": "c",
                "namespace": "dev",
                "uid": CAPTURE_UID,
                "creationTimestamp": "2026-12-01T10:00:00Z",
                "annotations": annotations,
                **(metadata or {}),
            },
            "spec": spec,
            "status": {"conditions": [ADMITTED] if conditions is None else conditions},
        }
    )


def pod(**changes: Any) -> Pod:
    defaults: dict[str, Any] = {
        "namespace": "dev",
        "name": "web-0",
        "uid": POD_UID,
        "labels": {"app": "web"},
        "addresses": ("10.0.0.1",),
        "phase": "Running",
        "host_network": False,
        "terminating": False,
    }
    return Pod(**(defaults | changes))


def plan(
    *captures: Capture,
    pods: list[Pod] | None = None,
    denied: set[str] | None = None,
    now: datetime = NOW,
    paused: Verdict | None = None,
) -> Plan:
    return reconcile.plan(
        captures,
        [pod()] if pods is None else pods,
        namespaces_opted_out=denied or set(),
        now=now,
        ring_bytes=4 << 20,
        paused=paused,
    )


def only(made: Plan) -> CapturePlan:
    (capture_plan,) = made.captures
    return capture_plan


def test_a_matching_pod_is_captured_as_the_spec_says() -> None:
    spec = {
        "filters": [{"protocol": "TCP", "ports": [80]}],
        "snapLength": 128,
        "rotation": {"maxFileSize": "1M", "maxFiles": 3, "maxFileAge": "90s"},
        "endTime": "2026-12-01T10:30:00Z",
    }
    made = plan(capture(spec))
    (target,) = made.targets.values()
    assert (target.capture_uid, target.pod_uid, target.pod_addresses) == (CAPTURE_UID, POD_UID, ("10.0.0.1",))
    assert target.filter == "(tcp and (port 80))"
    assert (target.snap_length, target.max_file_bytes, target.max_files) == (128, 1_000_000, 3)
    assert target.max_file_age_seconds == 90
    assert target.until == (CREATED + timedelta(minutes=30)).timestamp()
    assert only(made).verdict is None


def test_without_an_end_time_a_capture_ends_after_the_policys_longest_duration() -> None:
    made = plan(capture())
    assert [target.until for target in made.targets.values()] == [(CREATED + timedelta(hours=1)).timestamp()]
    assert made.wake_at == CREATED + timedelta(hours=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "other"},
        {"labels": {"app": "db"}},
        {"labels": {}},
        {"phase": "Succeeded"},
        {"phase": "Failed"},
    ],
)
def test_a_pod_that_does_not_match_is_none_of_its_business(changes: dict[str, Any]) -> None:
    made = plan(capture(), pods=[pod(**changes)])
    assert (made.targets, only(made).matched, only(made).verdict) == ({}, 0, None)


@pytest.mark.parametrize(
    ("changes", "denied", "reason"),
    [
        ({"host_network": True}, set(), "HostNetwork"),
        ({"addresses": ()}, set(), "PodHasNoAddress"),
        ({"addresses": (), "phase": "Pending"}, set(), "PodHasNoAddress"),
        ({"labels": {"app": "web", "kubepcap.io/capture": "deny"}}, set(), "OptedOut"),
        ({}, {"dev"}, "OptedOut"),
    ],
)
def test_a_matching_pod_that_is_not_captured_is_told_why(
    changes: dict[str, Any], denied: set[str], reason: str
) -> None:
    made = plan(capture(), pods=[pod(**changes)], denied=denied)
    verdict = only(made).verdict
    assert made.targets == {}
    assert only(made).matched == 1
    assert verdict is not None
    assert verdict.reason == reason
    assert verdict.message


def test_a_pod_is_captured_before_it_runs_once_it_has_an_address() -> None:
    assert len(plan(capture(), pods=[pod(phase="Pending")]).targets) == 1


def test_a_terminating_pod_is_captured_to_its_end() -> None:
    made = plan(capture(), pods=[pod(terminating=True)])
    assert only(made).ending == made.targets.keys()


def test_one_pod_that_can_not_be_captured_does_not_hinder_another() -> None:
    other = pod(name="web-1", uid="11111111-1111-4111-8111-111111111111", host_network=True)
    made = plan(capture(), pods=[pod(), other])
    assert len(made.targets) == 1
    verdict = only(made).verdict
    assert verdict is not None
    assert verdict.reason == "HostNetwork"


@pytest.mark.parametrize(
    ("given", "now", "state", "reason"),
    [
        (capture(stamped=False), NOW, "Error", "NotStamped"),
        (capture({"suspend": True}), NOW, "Scheduled", "Suspended"),
        (capture(conditions=[]), NOW, "Scheduled", "NotAdmittedYet"),
        (
            capture(conditions=[ADMITTED | {"status": "False", "reason": "QuotaReached", "message": "10 of 10"}]),
            NOW,
            "Scheduled",
            "QuotaReached",
        ),
        (capture({"startTime": "2026-12-01T10:10:00Z"}), NOW, "Scheduled", "BeforeStartTime"),
        (capture({"endTime": "2026-12-01T10:05:00Z"}), NOW, "Finished", "EndTimeReached"),
        (capture(), CREATED + timedelta(hours=1), "Finished", "LongestDurationReached"),
        (capture(metadata={"deletionTimestamp": "2026-12-01T10:04:00Z"}), NOW, "Finished", "Deleted"),
    ],
)
def test_a_capture_that_is_held_back_takes_nothing_and_says_why(
    given: Capture, now: datetime, state: str, reason: str
) -> None:
    made = plan(given, now=now)
    verdict = only(made).verdict
    assert made.targets == {}
    assert verdict is not None
    assert (verdict.state, verdict.reason) == (state, reason)
    assert verdict.message


def test_a_changed_spec_without_a_new_stamp_takes_nothing() -> None:
    given = capture()
    assert isinstance(given.order, reconcile.Order)
    document = given.order.capture.to_json()
    document["spec"]["selector"] = "all()"
    verdict = only(plan(parse_capture(document))).verdict
    assert verdict is not None
    assert verdict.reason == "StampOutdated"


def test_a_capture_that_can_not_be_read_is_an_error_of_its_own() -> None:
    broken = parse_capture({"metadata": {"name": "b", "namespace": "dev", "uid": "x"}, "spec": {"selector": "==="}})
    made = plan(broken, capture())
    verdict = made.captures[0].verdict
    assert verdict is not None
    assert verdict.reason == "Unreadable"
    assert broken.uid == "x"
    assert len(made.targets) == 1


def test_a_start_time_is_the_next_moment_to_look_again_and_then_captures() -> None:
    given = capture({"startTime": "2026-12-01T10:10:00Z"})
    start = CREATED + timedelta(minutes=10)
    assert plan(given).wake_at == start
    assert len(plan(given, now=start).targets) == 1


def test_a_pause_stops_all_that_would_capture_and_leaves_the_rest_as_it_is() -> None:
    full = Verdict("Error", "DiskPressure", "full")
    made = plan(capture(), capture({"suspend": True}), paused=full)
    assert made.targets == {}
    assert [each.verdict.reason for each in made.captures if each.verdict] == ["DiskPressure", "Suspended"]


def test_two_captures_of_one_pod_are_two_targets() -> None:
    other = capture(metadata={"uid": "22222222-2222-4222-8222-222222222222"})
    assert len(plan(capture(), other).targets) == 2


def test_a_capture_reads_back_what_it_was_made_of() -> None:
    order = capture().order
    assert isinstance(order, reconcile.Order)
    assert isinstance(order.capture, PacketCapture)


def test_a_pod_is_read_from_kubernetes() -> None:
    read = parse_pod(
        {
            "metadata": {"namespace": "dev", "name": "web-0", "uid": POD_UID, "deletionTimestamp": "x"},
            "spec": {"hostNetwork": True},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "FD00::1"}]},
        }
    )
    assert read.addresses == ("10.0.0.1", "fd00::1")
    assert read.host_network
    assert read.terminating
    assert not read.opted_out


def test_a_pod_without_status_has_no_address() -> None:
    read = parse_pod({"metadata": {"namespace": "dev", "name": "web-0", "uid": POD_UID}})
    assert (read.addresses, read.phase, read.labels) == ((), "Unknown", {})
