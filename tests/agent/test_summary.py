"""What a node says of a capture."""

import pytest

from agent.capturer.protocol import InterfaceStatus, State, TargetStatus
from agent.reconcile import Capture, CapturePlan, Verdict
from agent.summary import Files, summarize
from agent.tally import Count, Counters
from api.capturenode import NodeCapture
from tests.agent.test_reconcile import NOW, capture, only, plan, pod

CAPTURE = capture()
PLAN = only(plan(CAPTURE))
(TARGET,) = PLAN.targets


def run(state: State, *, reason: str = "", packets: int = 0, dropped: int = 0) -> TargetStatus:
    interface = InterfaceStatus(interface="eth0", state=state, packets=packets, dropped=dropped)
    return TargetStatus(
        target=TARGET, started=1, state=state, reason=reason, message=reason and "so", interfaces=(interface,)
    )


def summary(
    plan: CapturePlan, status: TargetStatus | None, *, packets: int = 0, seen: int = 0, files: int = 0
) -> NodeCapture:
    counters = Counters(earlier=Count(packets, seen=seen), evicted=3, interruptions=1, interrupted_at=NOW)
    made = summarize(plan, status=lambda _: status, counters=counters, files=Files(files, files * 10))
    assert made is not None
    return made


def test_a_capture_without_pods_and_files_here_is_not_reported() -> None:
    nothing = only(plan(CAPTURE, pods=[]))
    assert summarize(nothing, status=lambda _: None, counters=Counters(), files=Files()) is None


@pytest.mark.parametrize(
    "held_back",
    [capture(conditions=[]), capture({"suspend": True}), capture({"endTime": "2026-12-01T10:05:00Z"})],
    ids=["not admitted yet", "suspended", "over"],
)
def test_a_capture_that_is_held_back_is_reported_only_with_what_it_left(held_back: Capture) -> None:
    waiting = only(plan(held_back))
    assert summarize(waiting, status=lambda _: None, counters=Counters(), files=Files()) is None
    for counters, files in (
        (Counters(), Files(1, 10)),
        (Counters(earlier=Count(5)), Files()),
        (Counters(interruptions=1), Files()),
    ):
        assert summarize(waiting, status=lambda _: None, counters=counters, files=files) is not None


def test_a_capture_whose_pods_left_is_reported_as_long_as_its_files_are_here() -> None:
    made = summary(only(plan(CAPTURE, pods=[])), None, packets=3, files=2)
    assert (made.state, made.reason, made.files, made.bytes, made.packets) == (
        "WaitingForTraffic",
        "NoPodMatches",
        2,
        20,
        3,
    )


@pytest.mark.parametrize(
    ("status", "packets", "expected"),
    [
        (None, 0, ("WaitingForTraffic", "Starting", 0)),
        (run(State.STARTING), 0, ("WaitingForTraffic", "Starting", 0)),
        (run(State.CAPTURING), 0, ("WaitingForTraffic", "NoPacketYet", 1)),
        (run(State.CAPTURING), 5, ("Capturing", "", 1)),
        (run(State.FAILED, reason="WriteFailed"), 5, ("Error", "WriteFailed", 0)),
    ],
)
def test_the_state_is_what_the_capturer_makes_of_it(
    status: TargetStatus | None, packets: int, expected: tuple[str, str, int]
) -> None:
    made = summary(PLAN, status, packets=packets)
    assert (made.state, made.reason, made.pods) == expected


@pytest.mark.parametrize(("told", "reported"), [("WriteFailed", "WriteFailed"), ("no\nword", "Other")])
def test_a_reason_that_is_no_word_is_not_reported(told: str, reported: str) -> None:
    assert summary(PLAN, run(State.FAILED, reason=told)).reason == reported


def test_a_verdict_stands_when_there_are_no_targets() -> None:
    made = summary(CapturePlan(CAPTURE, 2, verdict=Verdict("Scheduled", "Suspended", "m" * 1000)), None)
    assert (made.state, made.reason, len(made.message)) == ("Scheduled", "Suspended", 512)


def test_trouble_with_one_pod_is_told_beside_the_capture_of_the_others() -> None:
    other = pod(name="web-1", cgroup_uid="11111111-1111-4111-8111-111111111111", host_network=True)
    made = summary(only(plan(CAPTURE, pods=[pod(), other])), run(State.CAPTURING), packets=1)
    assert (made.state, made.reason) == ("Capturing", "HostNetwork")
    assert made.message.startswith("1 of 2 pods; pod web-1")


def test_that_the_interface_of_a_terminating_pod_goes_is_no_trouble() -> None:
    ending = only(plan(CAPTURE, pods=[pod(terminating=True)]))
    assert summary(ending, run(State.FAILED, reason="InterfaceFailed")).state == "WaitingForTraffic"


@pytest.mark.parametrize(
    ("seen", "reason", "message"),
    [
        (0, "NoPacketYet", "no packet of these pods has been seen yet"),
        (18204, "FilterMatchedNothing", "filter matched 0 of 18,204 packets seen on 1 pod"),
    ],
)
def test_a_filter_that_lets_nothing_through_is_told_from_silence(seen: int, reason: str, message: str) -> None:
    made = summary(PLAN, run(State.CAPTURING), seen=seen)
    assert (made.state, made.reason, made.message) == ("WaitingForTraffic", reason, message)
    assert summary(PLAN, run(State.CAPTURING), seen=seen, packets=1).state == "Capturing"


def test_what_was_matched_seen_evicted_and_interrupted_is_told() -> None:
    made = summary(PLAN, run(State.CAPTURING), packets=1, seen=7)
    assert (made.matched, made.seen, made.evicted, made.interruptions, made.interrupted_at) == (1, 7, 3, 1, NOW)
