"""What a capture's status says, and above all why nothing comes when nothing does."""

from datetime import datetime
from typing import Any

import pytest

from api.packetcapture import PacketCapture, PacketCaptureStatus
from controller.events import transitions
from controller.quota import admit
from controller.reports import NodeReport, Reports
from controller.summary import LONGEST_LIST, headline, outline, settles_at, summarize, unreadable, without_numbers
from tests.controller.cases import START, after, capture, node

Json = dict[str, Any]


SETTLED = {
    "conditions": [
        {"type": "Admitted", "status": "True", "reason": "WithinLimit", "lastTransitionTime": "2029-12-31T23:59:00Z"}
    ]
}
"""Admitted long enough for every agent to have said something."""


def status(
    one: PacketCapture, *nodes: NodeReport, now: datetime = START, agents: int | None = None
) -> PacketCaptureStatus:
    if not one.status.conditions:
        settled = PacketCaptureStatus.model_validate(SETTLED)
        one = one.model_copy(update={"status": one.status.model_copy(update={"conditions": settled.conditions})})
    (admission,) = admit([one], already=(), now=now).values()
    reports = Reports()
    for one_node in nodes:
        reports.put(one_node, one_node.heartbeat or now)
    reports.listen(now)
    said = reports.of(one.metadata)
    return summarize(one, admission, said, agents=reports.agents if agents is None else agents, now=now)


def told(given: PacketCaptureStatus, kind: str) -> tuple[str, str, str]:
    condition = given.condition(kind)
    assert condition is not None
    return condition.status, condition.reason, condition.message


def reasons(given: PacketCaptureStatus) -> dict[str, tuple[str, str]]:
    return {condition.type: (condition.status, condition.reason) for condition in given.conditions}


def capturing(given: PacketCaptureStatus) -> tuple[str, str, str]:
    return told(given, "Capturing")


HOST_NETWORK = {"state": "Error", "reason": "HostNetwork", "message": "pod x uses the node's network"}
WAITING = {"state": "WaitingForTraffic", "pods": 1}


@pytest.mark.parametrize(
    ("said", "phase", "holds", "reason", "words"),
    [
        ([{"pods": 2, "packets": 5}], "Capturing", "True", "Capturing", "2 pods are captured on 1 node"),
        ([{"pods": 1}, WAITING], "Capturing", "True", "Capturing", "1 pod is captured on 1 node"),
        ([WAITING], "WaitingForTraffic", "True", "NoPacketYet", "no packet has come yet"),
        (
            [
                WAITING | {"reason": "FilterMatchedNothing", "pods": 2, "seen": 18000},
                WAITING | {"reason": "FilterMatchedNothing", "seen": 204},
                WAITING,
            ],
            "WaitingForTraffic",
            "True",
            "FilterMatchedNothing",
            "filter matched 0 of 18,204 packets seen on 3 pods",
        ),
        (
            [{"state": "WaitingForTraffic", "reason": "PodHasNoAddress", "message": "pod x has no address yet"}],
            "WaitingForTraffic",
            "False",
            "PodHasNoAddress",
            "pod x has no address yet",
        ),
        ([HOST_NETWORK], "Error", "False", "HostNetwork", "on node n0: pod x uses the node's network"),
        ([HOST_NETWORK] * 3, "Error", "False", "HostNetwork", "on node n0 and 2 more nodes: pod x uses"),
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


def test_however_much_nodes_count_a_sum_stays_what_kube_apiserver_takes() -> None:
    given = status(capture("web"), *(node(f"n{number}", {"packets": 2**53}) for number in range(3)))
    assert given.packets == 2**53


def test_without_numbers_a_status_still_says_what_holds() -> None:
    given = status(capture("web"), node("n", {"pods": 1, "packets": 5, "message": "m"}))
    bare = without_numbers(given)
    assert (bare.packets, bare.nodes) == (0, [])
    assert headline(bare) == headline(given)


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


def test_counters_and_the_messages_that_name_them_are_not_part_of_the_outline() -> None:
    said = {"state": "Capturing", "pods": 1, "packets": 1, "dropped": 1}
    few, many, others = (
        status(capture("web"), node("n", said | one))
        for one in ({}, {"packets": 9, "bytes": 9, "dropped": 5, "message": "5 lost"}, {"pods": 2})
    )
    assert told(few, "Complete")[2] != told(many, "Complete")[2]
    assert outline(few) == outline(many)
    assert outline(few) != outline(others)
    assert headline(few) == headline(others)


def test_the_headline_is_what_holds_for_the_capture_as_a_whole() -> None:
    whole, lossy = (status(capture("web"), node("n", {"pods": 1, "packets": 9, "dropped": n})) for n in (0, 1))
    assert headline(whole) != headline(lossy)


def test_what_a_new_admission_means_is_not_said_before_every_agent_had_the_time_to_say_it() -> None:
    one = capture("web")
    (admission,) = admit([one], already=(), now=START).values()
    fresh = summarize(one, admission, [], agents=3, now=START)
    assert (fresh.phase, capturing(fresh)[1]) == ("Scheduled", "Starting")
    assert told(fresh, "PodsMatched")[:2] == ("Unknown", "Starting")
    later = summarize(capture("web", status=fresh.to_json()), admission, [], agents=3, now=after(seconds=4))
    assert (later.phase, capturing(later)[1]) == ("WaitingForTraffic", "NoPodMatches")
    assert told(later, "PodsMatched")[:2] == ("False", "NoPodMatches")


def test_an_admission_settles_also_when_the_clock_was_set_back() -> None:
    (admission,) = admit([capture("web")], already=(), now=START).values()
    previous = PacketCaptureStatus.model_validate(SETTLED)
    assert settles_at(previous, admission, agents=0, now=after(hours=-1)) == after(hours=-1, seconds=3)
    assert settles_at(previous, admission, agents=1000, now=after(hours=-1)) == after(hours=-1, seconds=13)


def test_all_that_can_be_said_of_a_capture_that_runs_well() -> None:
    given = status(capture("web"), node("n", {"pods": 1, "matched": 1, "packets": 5}))
    assert reasons(given) == {
        "Admitted": ("True", "WithinLimit"),
        "Capturing": ("True", "Capturing"),
        "PodsMatched": ("True", "PodsMatch"),
        "Complete": ("True", "AllPacketsKept"),
        "DiskPressure": ("False", "DiskHasRoom"),
        "Degraded": ("False", "AsExpected"),
    }


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (
            capture("web", policy=None),
            {"PodsMatched": ("Unknown", "NotStamped"), "Complete": ("Unknown", "NoPacketYet")},
        ),
        (
            capture("web", suspend=True),
            {"PodsMatched": ("Unknown", "Suspended"), "Capturing": ("False", "Suspended")},
        ),
        (
            capture("web", startTime="2030-01-01T10:00:00Z"),
            {"PodsMatched": ("Unknown", "BeforeStartTime"), "Capturing": ("False", "BeforeStartTime")},
        ),
        (
            capture("web", endTime="2029-12-31T00:00:00Z"),
            {"PodsMatched": ("Unknown", "Ended"), "Capturing": ("False", "Ended")},
        ),
    ],
    ids=["not stamped", "suspended", "starts later", "over"],
)
def test_all_that_can_be_said_of_a_capture_that_does_not_run(
    one: PacketCapture, expected: dict[str, tuple[str, str]]
) -> None:
    given = reasons(status(one, node("n", {"state": "Error", "reason": "DiskPressure", "matched": 1})))
    assert {kind: given[kind] for kind in expected} == expected
    assert given["DiskPressure"] == ("False", "NotRunning")
    assert given["Degraded"] == ("False", "NotRunning")


def test_a_capture_that_stopped_keeps_what_was_found_of_its_pods() -> None:
    running = status(capture("web"), node("n", {"pods": 1, "matched": 1, "packets": 5}))
    over = status(
        capture("web", status=running.to_json()), node("n", {"packets": 5}, heard=after(hours=2)), now=after(hours=2)
    )
    assert over.phase == "Finished"
    assert told(over, "PodsMatched") == told(running, "PodsMatched")


def test_that_a_silent_nodes_capture_is_suspended_is_no_recovery() -> None:
    silent = {"state": "Error", "reason": "DiskPressure", "packets": 5}
    degraded = status(capture("web"), node("n", silent))
    suspended = status(capture("web", status=degraded.to_json(), suspend=True), node("n", silent))
    assert reasons(degraded)["Degraded"] == ("True", "DiskPressure")
    assert [one.reason for one in transitions(degraded, suspended, started_by="u")] == ["Suspended"]


def test_packets_of_a_node_that_is_gone_are_missed_by_whoever_leads() -> None:
    before = status(capture("web"), node("a", {"pods": 1, "packets": 5}), node("b", {"pods": 1}))
    one = capture("web", status=before.to_json())
    later = Reports()
    later.put(node("b", {"pods": 1}), START)
    assert later.gone(one.metadata, before.nodes) == {"a"}
    later.put(node("a"), START)
    assert later.gone(one.metadata, before.nodes) == set()


LATER = {"endTime": "2030-01-01T00:50:00Z"}
SCHEDULES: list[tuple[str, list[tuple[Json, datetime, str, str]]]] = [
    (
        "the end is moved later while it runs",
        [
            ({"endTime": "2030-01-01T00:10:00Z"}, after(minutes=5), "WaitingForTraffic", "NoPodMatches"),
            (LATER, after(minutes=11), "WaitingForTraffic", "NoPodMatches"),
            (LATER, after(minutes=50), "Finished", "Ended"),
        ],
    ),
    (
        "the end is moved earlier while it runs",
        [
            (LATER, after(minutes=5), "WaitingForTraffic", "NoPodMatches"),
            ({"endTime": "2030-01-01T00:04:00Z"}, after(minutes=5), "Finished", "Ended"),
        ],
    ),
    (
        "it is over, and its end is moved later: it runs again",
        [
            ({"endTime": "2030-01-01T00:10:00Z"}, after(minutes=11), "Finished", "Ended"),
            (LATER, after(minutes=12), "Scheduled", "Starting"),
            (LATER, after(minutes=13), "WaitingForTraffic", "NoPodMatches"),
        ],
    ),
    (
        "no end goes beyond the policy's longest duration",
        [
            ({"endTime": "2030-01-01T09:00:00Z"}, after(minutes=59), "WaitingForTraffic", "NoPodMatches"),
            ({"endTime": "2030-01-01T09:00:00Z"}, after(minutes=60), "Finished", "Ended"),
        ],
    ),
    (
        "it is suspended and goes on",
        [
            ({}, after(minutes=1), "WaitingForTraffic", "NoPodMatches"),
            ({"suspend": True}, after(minutes=2), "Scheduled", "Suspended"),
            ({}, after(minutes=3), "Scheduled", "Starting"),
            ({}, after(minutes=4), "WaitingForTraffic", "NoPodMatches"),
        ],
    ),
    (
        "it is suspended until it is over",
        [
            ({"suspend": True}, after(minutes=2), "Scheduled", "Suspended"),
            ({"suspend": True}, after(minutes=60), "Finished", "Ended"),
        ],
    ),
    (
        "it starts later",
        [
            ({"startTime": "2030-01-01T00:10:00Z"}, after(minutes=1), "Scheduled", "BeforeStartTime"),
            ({"startTime": "2030-01-01T00:10:00Z"}, after(minutes=10), "WaitingForTraffic", "NoPodMatches"),
            ({"startTime": "2030-01-01T00:10:00Z"}, after(minutes=70), "Finished", "Ended"),
        ],
    ),
    (
        "the clock was wrong, and is set back before the end",
        [
            (LATER, after(days=1), "Finished", "Ended"),
            (LATER, after(minutes=1), "Scheduled", "Starting"),
            (LATER, after(minutes=2), "WaitingForTraffic", "NoPodMatches"),
            (LATER, after(minutes=51), "Finished", "Ended"),
        ],
    ),
]


@pytest.mark.parametrize("steps", [steps for _, steps in SCHEDULES], ids=[name for name, _ in SCHEDULES])
def test_a_schedule_that_changes(steps: list[tuple[Json, datetime, str, str]]) -> None:
    written = SETTLED
    for spec, now, phase, reason in steps:
        given = status(capture("web", status=written, **spec), agents=1, now=now)
        assert (given.phase, capturing(given)[1]) == (phase, reason)
        assert (given.finished_time is not None) == (phase == "Finished")
        written = given.to_json()


def test_a_capture_that_can_not_be_read_says_so_and_keeps_its_numbers() -> None:
    given = unreadable(PacketCaptureStatus(packets=7), message="spec: selector: …", generation=2, now=START)
    assert (given.phase, given.packets) == ("Error", 7)
    assert capturing(given) == ("False", "SpecUnreadable", "spec: selector: …")
