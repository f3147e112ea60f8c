"""What a node says of a capture."""

import pytest

from agent.capturer.protocol import InterfaceStatus, State, TargetStatus
from agent.reconcile import CapturePlan, Verdict
from agent.summary import Count, Files, Tally, summarize
from api.capturenode import NodeCapture
from tests.agent.test_reconcile import capture, only, plan, pod

CAPTURE = capture()
PLAN = only(plan(CAPTURE))
(TARGET,) = PLAN.targets


def run(state: State, *, reason: str = "", packets: int = 0, dropped: int = 0) -> TargetStatus:
    interface = InterfaceStatus(interface="eth0", state=state, packets=packets, dropped=dropped)
    return TargetStatus(
        target=TARGET, started=1, state=state, reason=reason, message=reason and "so", interfaces=(interface,)
    )


def summary(plan: CapturePlan, status: TargetStatus | None, *, packets: int = 0, files: int = 0) -> NodeCapture:
    made = summarize(plan, status=lambda _: status, count=Count(packets), files=Files(files, files * 10))
    assert made is not None
    return made


def test_a_capture_without_pods_and_files_here_is_not_reported() -> None:
    nothing = only(plan(CAPTURE, pods=[]))
    assert summarize(nothing, status=lambda _: None, count=Count(), files=Files()) is None


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


def test_a_verdict_stands_when_there_are_no_targets() -> None:
    made = summary(CapturePlan(CAPTURE, 2, verdict=Verdict("Scheduled", "Suspended", "m" * 1000)), None)
    assert (made.state, made.reason, len(made.message)) == ("Scheduled", "Suspended", 512)


def test_trouble_with_one_pod_is_told_beside_the_capture_of_the_others() -> None:
    other = pod(name="web-1", uid="11111111-1111-4111-8111-111111111111", host_network=True)
    made = summary(only(plan(CAPTURE, pods=[pod(), other])), run(State.CAPTURING), packets=1)
    assert (made.state, made.reason) == ("Capturing", "HostNetwork")
    assert made.message.startswith("1 of 2 pods; pod web-1")


def test_that_the_interface_of_a_terminating_pod_goes_is_no_trouble() -> None:
    ending = only(plan(CAPTURE, pods=[pod(terminating=True)]))
    assert summary(ending, run(State.FAILED, reason="InterfaceFailed")).state == "WaitingForTraffic"


def test_counters_are_those_of_ended_runs_and_of_those_that_go_on() -> None:
    tally = Tally()
    tally.add_run(run(State.STOPPED, packets=10, dropped=1))
    tally.add(TARGET.capture_uid, packets=5)
    assert tally.total(TARGET.capture_uid, [run(State.CAPTURING, packets=100, dropped=2)]) == Count(115, 3)
    assert tally.total(TARGET.capture_uid, []) == Count(15, 1)
    assert tally.total("other", [run(State.CAPTURING, packets=100)]) == Count()
    tally.forget(TARGET.capture_uid)
    assert tally.total(TARGET.capture_uid, []) == Count()
