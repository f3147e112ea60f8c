"""What a capture's status says, and above all why nothing comes when nothing does."""

from datetime import datetime
from typing import Any

import pytest

from api.capturenode import CaptureNode
from api.packetcapture import PacketCapture, PacketCaptureStatus
from controller.quota import admit
from controller.summary import LONGEST_LIST, Report, outline, silent_since, summarize, unreadable
from tests.controller.cases import START, after, capture, node

Json = dict[str, Any]


def status(
    one: PacketCapture, *nodes: CaptureNode, now: datetime = START, agents: int | None = None
) -> PacketCaptureStatus:
    (admission,) = admit([one], already=(), now=now).values()
    reports = [
        Report(node.metadata.name, said, silent_since(node, now))
        for node in nodes
        for said in node.status.captures
        if said.uid == one.metadata.uid
    ]
    return summarize(one, admission, reports, agents=len(nodes) if agents is None else agents, now=now)


def capturing(given: PacketCaptureStatus) -> tuple[str, str, str]:
    condition = given.condition("Capturing")
    assert condition is not None
    return condition.status, condition.reason, condition.message


HOST_NETWORK = {"state": "Error", "reason": "HostNetwork", "message": "pod x uses the node's network"}
WAITING = {"state": "WaitingForTraffic", "pods": 1}


@pytest.mark.parametrize(
    ("said", "phase", "holds", "reason", "words"),
    [
        ([{"pods": 2, "packets": 5}], "Capturing", "True", "Capturing", "2 pods are captured on 1 node"),
        ([{"pods": 1}, WAITING], "Capturing", "True", "Capturing", "1 pod is captured on 1 node"),
        ([WAITING], "WaitingForTraffic", "True", "NoPacketYet", "no packet has come yet"),
        (
            [WAITING | {"reason": "FilterMatchedNothing", "message": "0 of 812 packets match"}],
            "WaitingForTraffic",
            "True",
            "FilterMatchedNothing",
            "0 of 812 packets match",
        ),
        (
            [{"state": "WaitingForTraffic", "reason": "PodHasNoAddress", "message": "pod x has no address yet"}],
            "WaitingForTraffic",
            "False",
            "PodHasNoAddress",
            "pod x has no address yet",
        ),
        ([HOST_NETWORK], "Error", "False", "HostNetwork", "on node n0: pod x uses the node's network"),
        ([HOST_NETWORK] * 3, "Error", "False", "HostNetwork", "(and on 2 more nodes)"),
        ([HOST_NETWORK, WAITING], "WaitingForTraffic", "True", "NoPacketYet", "; on node n0: pod x uses"),
        ([HOST_NETWORK, {"pods": 1}], "Capturing", "True", "Capturing", "; on node n0: pod x uses"),
        ([{"state": "Scheduled"}], "Scheduled", "False", "Starting", "about to begin"),
        (
            [],
            "WaitingForTraffic",
            "False",
            "NoPodMatches",
            "no pod in namespace dev that the selector matches runs now",
        ),
        ([{"state": "Finished"}], "WaitingForTraffic", "False", "NoPodMatches", "those that come later are captured"),
    ],
)
def test_a_running_capture(said: list[Json], phase: str, holds: str, reason: str, words: str) -> None:
    given = status(capture("web"), *(node(f"n{number}", one) for number, one in enumerate(said)), agents=3)
    assert given.phase == phase
    assert capturing(given)[:2] == (holds, reason)
    assert words in capturing(given)[2]


@pytest.mark.parametrize(
    ("one", "now", "phase", "reason", "words"),
    [
        (capture("web", policy=None), START, "Error", "NotStamped", "delete it and create it again"),
        (capture("web", suspend=True), START, "Scheduled", "Suspended", "spec.suspend is true"),
        (
            capture("web", startTime="2030-01-01T10:00:00Z"),
            START,
            "Scheduled",
            "BeforeStartTime",
            "it starts at 2030-01-01T10:00:00Z",
        ),
        (capture("web"), after(hours=1), "Finished", "Ended", "it ended at 2030-01-01T01:00:00Z"),
    ],
)
def test_a_capture_that_does_not_run_says_why(
    one: PacketCapture, now: datetime, phase: str, reason: str, words: str
) -> None:
    given = status(one, node("n", heard=now), now=now)
    assert given.phase == phase
    assert capturing(given)[:2] == ("False", reason)
    assert words in capturing(given)[2]


def test_a_capture_that_waits_for_its_turn_says_so() -> None:
    one, other = capture("web", limit=1, created=after(seconds=1)), capture("other", limit=1)
    admission = admit([one, other], already=(), now=START)["uid-web"]
    given = summarize(one, admission, [], agents=1, now=START)
    assert given.phase == "Scheduled"
    assert capturing(given)[1] == "QuotaExceeded"
    admitted = given.condition("Admitted")
    assert admitted is not None
    assert (admitted.status, admitted.reason) == ("False", "QuotaExceeded")


def test_without_any_agent_that_is_what_is_said() -> None:
    given = status(capture("web"), agents=0)
    assert (given.phase, capturing(given)[1]) == ("Scheduled", "NoAgent")


def test_numbers_are_summed() -> None:
    nodes = [node(f"n{number}", {"pods": 1, "packets": 10, "bytes": 1000, "dropped": number}) for number in range(3)]
    given = status(capture("web"), *nodes)
    assert (given.pods, given.packets, given.bytes, given.dropped) == (3, 30, 3000, 3)


def test_a_node_that_fell_silent_is_in_trouble_and_its_numbers_stay() -> None:
    now = after(minutes=2)
    speaking = node("a", {"pods": 1, "packets": 1}, heard=now)
    silent = node("b", {"pods": 1, "packets": 5})
    given = status(capture("web"), speaking, silent, now=now)
    assert (given.pods, given.packets) == (1, 6)
    assert [(entry.node, entry.state, entry.reason) for entry in given.nodes] == [
        ("b", "Error", "AgentSilent"),
        ("a", "Capturing", ""),
    ]
    assert "on node b: the node's agent has said nothing since 2030-01-01T00:00:00Z" in capturing(given)[2]


def test_the_list_of_nodes_is_bounded_and_troubled_ones_come_first() -> None:
    nodes = [node(f"n{number:03}", {"pods": 1}) for number in range(LONGEST_LIST + 5)]
    nodes += [node("z-lossy", {"pods": 1, "dropped": 1}), node("z-failed", HOST_NETWORK)]
    given = status(capture("web"), *nodes)
    assert [entry.node for entry in given.nodes[:3]] == ["z-failed", "z-lossy", "n000"]
    assert (len(given.nodes), given.more_nodes) == (LONGEST_LIST, 7)
    assert given.pods == LONGEST_LIST + 6


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    first = status(capture("web"), node("n", WAITING))
    second = status(
        capture("web", status=first.to_json()), node("n", {"pods": 1}, heard=after(minutes=1)), now=after(minutes=1)
    )
    third = status(
        capture("web", status=second.to_json(), suspend=True), node("n", heard=after(minutes=2)), now=after(minutes=2)
    )
    times = [one.condition("Capturing") for one in (first, second, third)]
    assert [time.last_transition_time for time in times if time] == [START, START, after(minutes=2)]


def test_the_same_reports_give_the_same_status() -> None:
    first = status(capture("web"), node("n", WAITING))
    again = status(capture("web", status=first.to_json()), node("n", WAITING), now=after(seconds=30))
    assert again.to_json() == first.to_json()


def test_a_finished_capture_says_when_it_finished() -> None:
    given = status(
        capture("web", endTime="2030-01-01T00:10:00Z"),
        node("n", {"state": "Finished", "packets": 3}),
        now=after(minutes=11),
    )
    assert given.finished_time == after(minutes=10)
    assert given.packets == 3


def test_counters_are_not_part_of_the_outline_and_states_are() -> None:
    few, many, other = (
        status(capture("web"), node("n", one))
        for one in ({"pods": 1, "packets": 1}, {"pods": 1, "packets": 9, "bytes": 9}, {"pods": 2, "packets": 1})
    )
    assert outline(few) == outline(many)
    assert outline(few) != outline(other)


def test_a_capture_that_can_not_be_read_says_so_and_keeps_its_numbers() -> None:
    given = unreadable(PacketCaptureStatus(packets=7), message="spec: selector: …", generation=2, now=START)
    assert (given.phase, given.packets) == ("Error", 7)
    assert capturing(given) == ("False", "SpecUnreadable", "spec: selector: …")
