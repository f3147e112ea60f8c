"""What is captured, and why not the rest: tables over the pure plan."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent import reconcile
from agent.pods import Pod, parse_pod
from agent.reconcile import Capture, CapturePlan, NodeLimits, Pauses, Plan, Verdict, parse_capture
from api import names, stamp
from api.capturepolicy import Limits
from api.labelvalues import ANY, LabelValues
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
    limits: Limits | None = None,
    conditions: list[dict[str, Any]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Capture:
    spec = {"selector": "app == 'web'"} | (spec or {})
    annotations = {}
    if stamped:
        given = stamp.Stamp(
            user="u",
            policy="baseline",
            limits=limits or Limits(max_duration=timedelta(hours=1)),
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
        "cgroup_uid": POD_UID,
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
    limits: NodeLimits | None = None,
    running: dict[str, int] | None = None,
    paused: Pauses | None = None,
) -> Plan:
    return reconcile.plan(
        captures,
        [pod()] if pods is None else pods,
        namespaces_opted_out=denied or set(),
        now=now,
        limits=limits or NodeLimits(),
        running=running,
        paused=paused,
    )


def only(made: Plan) -> CapturePlan:
    (capture_plan,) = made.captures
    return capture_plan


def test_a_capture_has_changed_only_when_something_did_that_the_agent_goes_by() -> None:
    before = capture()
    counted = {
        "type": "Capturing",
        "status": "True",
        "reason": "Capturing",
        "lastTransitionTime": "2026-12-01T10:00:02Z",
    }
    assert capture(conditions=[ADMITTED, counted], metadata={"resourceVersion": "7", "labels": {"a": "b"}}) == before
    assert capture(conditions=[]) != before
    assert capture({"suspend": True}) != before
    assert capture(metadata={"deletionTimestamp": "2026-12-01T10:01:00Z"}) != before
    assert capture(limits=Limits(max_duration=timedelta(hours=2))) != before
    assert capture(stamped=False) != before


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
    assert target.filter == PacketCaptureSpec.model_validate({"selector": "app == 'web'"} | spec).filter_expression()
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
    other = pod(name="web-1", cgroup_uid="11111111-1111-4111-8111-111111111111", host_network=True)
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
    assert only(made).matched == 0


def test_a_capture_that_is_over_does_not_look_at_pods_any_more() -> None:
    over = capture()
    plan(over)
    assert isinstance(over.order, reconcile.Order)
    assert over.order.known
    plan(over, now=CREATED + timedelta(hours=1))
    assert not over.order.known


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
    assert reasons(made) == {"x": "Unreadable"}
    assert broken.uid == "x"
    assert len(made.targets) == 1


def test_a_start_time_is_the_next_moment_to_look_again_and_then_captures() -> None:
    given = capture({"startTime": "2026-12-01T10:10:00Z"})
    start = CREATED + timedelta(minutes=10)
    assert plan(given).wake_at == start
    assert len(plan(given, now=start).targets) == 1


FULL = Verdict("Error", "DiskPressure", "full")
OTHER_UID = "22222222-2222-4222-8222-222222222222"


def reasons(made: Plan) -> dict[str, str]:
    return {each.capture.uid: each.verdict.reason for each in made.captures if each.verdict}


def test_a_pause_stops_all_that_would_capture_and_leaves_the_rest_as_it_is() -> None:
    suspended = capture({"suspend": True}, metadata={"uid": OTHER_UID})
    made = plan(capture(), suspended, paused=Pauses(node=FULL))
    assert made.targets == {}
    assert reasons(made) == {CAPTURE_UID: "DiskPressure", OTHER_UID: "Suspended"}


@pytest.mark.parametrize(
    ("paused", "stopped"),
    [
        (Pauses(captures={CAPTURE_UID: FULL}), {CAPTURE_UID}),
        (Pauses(namespaces={"dev": FULL}), {CAPTURE_UID, OTHER_UID}),
        (Pauses(namespaces={"prod": FULL}), set()),
    ],
)
def test_a_pause_stops_no_capture_outside_its_scope(paused: Pauses, stopped: set[str]) -> None:
    made = plan(capture(), capture(metadata={"uid": OTHER_UID}), paused=paused)
    assert reasons(made).keys() == stopped
    assert {target.capture_uid for target in made.targets.values()} == {CAPTURE_UID, OTHER_UID} - stopped


def pods(count: int) -> list[Pod]:
    return [
        pod(name=f"web-{number}", cgroup_uid=f"{number:08x}-0000-4000-8000-000000000000") for number in range(count)
    ]


def test_beyond_the_nodes_limit_the_older_capture_has_its_pods_and_the_other_says_why_not() -> None:
    older = capture(metadata={"uid": OTHER_UID, "creationTimestamp": "2026-12-01T09:59:59Z"})
    made = plan(capture(), older, pods=pods(3), limits=NodeLimits(targets=4))
    by_uid = {each.capture.uid: each for each in made.captures}
    assert (len(by_uid[OTHER_UID].targets), by_uid[OTHER_UID].verdict) == (3, None)
    newer = by_uid[CAPTURE_UID]
    assert (len(newer.targets), newer.matched, len(made.targets)) == (1, 3, 4)
    assert newer.verdict is not None
    assert (newer.verdict.state, newer.verdict.reason) == ("Error", "NodeLimit")
    assert newer.verdict.message.startswith("2 of its pods are not captured, since at most 4 ")


def test_what_runs_keeps_its_place_against_an_older_capture() -> None:
    older = capture(metadata={"uid": OTHER_UID, "creationTimestamp": "2026-12-01T09:59:59Z"})
    running = dict.fromkeys(plan(capture(), pods=pods(3)).targets, 1)
    made = plan(capture(), older, pods=pods(3), limits=NodeLimits(targets=4), running=running)
    assert made.targets.keys() > running.keys()
    assert reasons(made) == {OTHER_UID: "NodeLimit"}


def test_rings_are_limited_by_the_interfaces_that_they_serve() -> None:
    given = capture({"interfaces": ["eth0", "net1", "eth0"]}, limits=Limits(ring_size=8 << 20))
    made = plan(given, pods=pods(3), limits=NodeLimits(ring_bytes=32 << 20))
    assert [(target.interfaces, target.ring_bytes) for target in made.targets.values()] == [
        (("eth0", "net1"), 8 << 20)
    ] * 2
    assert reasons(made) == {CAPTURE_UID: "NodeLimit"}
    known = {f"{CAPTURE_UID}/{pods(1)[0].cgroup_uid}": 4}
    assert len(plan(given, pods=pods(3), limits=NodeLimits(ring_bytes=32 << 20), running=known).targets) == 1


def test_of_many_pods_only_those_that_changed_are_looked_at_again() -> None:
    asked: list[str] = []

    class Selector:
        def matches(self, labels: Mapping[str, str]) -> bool:
            asked.append(labels["app"])
            return labels["app"] == "web"

        def values_of(self, _: str) -> LabelValues:
            return ANY

    given = capture()
    assert isinstance(given.order, reconcile.Order)
    order = replace(given.order, selector=Selector(), known={})
    watched = replace(given, order=order)
    there = pods(50)
    first = plan(watched, pods=there)
    assert len(asked) == len(first.targets) == 50
    there[0] = replace(there[0], labels={"app": "db"})
    second = plan(watched, pods=there)
    assert asked[50:] == ["db"]
    assert len(second.targets) == 49
    assert len(plan(watched, pods=there[:3]).targets) == 2
    assert order.known.keys() == {"web-0", "web-1", "web-2"}


def test_writes_past_the_page_cache_are_asked_for_by_the_node() -> None:
    given = capture()
    assert isinstance(given.order, reconcile.Order)
    direct = parse_capture(given.order.capture.to_json(), direct=True)
    assert [target.direct for target in plan(direct).targets.values()] == [True]
    assert [target.direct for target in plan(given).targets.values()] == [False]


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


@pytest.mark.parametrize(
    ("mirrored", "expected"),
    [
        ("9c6b5f0d3f1e4c0b8a7d6e5f4c3b2a19", "9c6b5f0d3f1e4c0b8a7d6e5f4c3b2a19"),
        ("0a0a0a0a-425d-40de-944b-e07fc1f90ae7", "0a0a0a0a-425d-40de-944b-e07fc1f90ae7"),
        ("../../etc", POD_UID),
    ],
)
def test_a_static_pod_is_known_by_the_uid_that_kubelet_gave_it(mirrored: str, expected: str) -> None:
    metadata = {
        "namespace": "dev",
        "name": "web-node-1",
        "uid": POD_UID,
        "labels": {"app": "web"},
        "annotations": {"kubernetes.io/config.mirror": mirrored},
    }
    read = parse_pod({"metadata": metadata, "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]}})
    (target,) = plan(capture(), pods=[read]).targets.values()
    assert target.pod_uid == expected
    names.file_name(pod=target.pod_name, interface="eth0", created_ns=0, pod_uid=target.pod_uid, sequence=0)


def test_a_pod_without_status_has_no_address() -> None:
    read = parse_pod({"metadata": {"namespace": "dev", "name": "web-0", "uid": POD_UID}})
    assert (read.addresses, read.phase, read.labels) == ((), "Unknown", {})


def test_beyond_the_policys_limit_the_pods_that_run_stay_and_others_wait_for_their_place() -> None:
    given = capture(limits=Limits(max_pods_per_node=2))
    made = plan(given, pods=pods(3))
    assert (len(made.targets), only(made).matched) == (2, 3)
    assert reasons(made) == {CAPTURE_UID: "PolicyLimit"}
    last = f"{CAPTURE_UID}/{pods(3)[2].cgroup_uid}"
    again = plan(given, pods=pods(3), running={last: 1})
    assert last in again.targets
    assert len(again.targets) == 2
    assert only(plan(given, pods=pods(2))).verdict is None


def test_the_policys_limit_is_each_captures_own() -> None:
    other = capture(metadata={"uid": OTHER_UID}, limits=Limits(max_pods_per_node=3))
    made = plan(capture(limits=Limits(max_pods_per_node=1)), other, pods=pods(3))
    assert {each.capture.uid: len(each.targets) for each in made.captures} == {CAPTURE_UID: 1, OTHER_UID: 3}
