"""What is said of a capture as a whole: worst first, with counts and nodes, and never longer than a person reads."""

from datetime import timedelta

import pytest

from api.object import Condition
from controller.conditions import Finding, complete, degraded, disk_pressure, pods_matched
from controller.reports import Said
from tests.controller.cases import START, Json, node


def nodes(*said: Json) -> list[Said]:
    return [node(f"n{number}", one).captures["uid-web"] for number, one in enumerate(said)]


def condition(finding: Finding) -> Condition:
    return Condition(
        type="Complete",
        status=finding.status,
        reason=finding.reason,
        message=finding.message,
        last_transition_time=START - timedelta(hours=1),
    )


@pytest.mark.parametrize(
    ("said", "agents", "settled", "expected"),
    [
        ([{"matched": 1}], 1, False, ("True", "PodsMatch", "1 pod matches on 1 node")),
        ([{"matched": 1}, {"matched": 2}, {}], 3, True, ("True", "PodsMatch", "3 pods match on 2 nodes")),
        ([], 0, True, ("Unknown", "NoAgent", "no agent has reported")),
        ([], 3, False, ("Unknown", "Starting", "about to begin")),
        ([{"matched": 0}], 3, True, ("False", "NoPodMatches", "no pod in namespace dev")),
    ],
)
def test_pods_matched(said: list[Json], agents: int, settled: bool, expected: tuple[str, str, str]) -> None:
    found = pods_matched(nodes(*said), agents=agents, settled=settled, namespace="dev")
    assert (found.status, found.reason) == expected[:2]
    assert expected[2] in found.message


def completed(said: list[Said], previous: Condition | None = None, *, gone: tuple[str, ...] = ()) -> Finding:
    return complete(said, previous, gone=gone, max_files=2)


LOST = {"packets": 9, "dropped": 5000}
DIED = {"packets": 9, "interruptions": 2}
EVICTED = {"packets": 9, "evicted": 1}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([{}], ("Unknown", "NoPacketYet", "no packet has been captured yet")),
        ([{"packets": 1}], ("True", "AllPacketsKept", "rotation keeps the newest 2 files of each interface")),
        ([LOST], ("False", "PacketsDropped", "5,000 packets were lost on node n0: a narrower filter")),
        ([LOST, LOST, LOST], ("False", "PacketsDropped", "15,000 packets were lost on node n0 and 2 more nodes:")),
        ([{}, DIED], ("False", "Interrupted", "capturing was interrupted 2 times on node n1: what came")),
        ([EVICTED], ("False", "FilesEvicted", "1 file was removed to keep the disk's limits on node n0")),
        ([LOST, DIED, EVICTED], ("False", "FilesEvicted", "on node n2; capturing was interrupted 2 times on node n1")),
        ([LOST, DIED], ("False", "Interrupted", "is in no file; 5,000 packets were lost on node n0")),
    ],
)
def test_complete(said: list[Json], expected: tuple[str, str, str]) -> None:
    found = completed(nodes(*said))
    assert (found.status, found.reason) == expected[:2]
    assert expected[2] in found.message


def test_what_was_lost_stays_lost_when_nobody_counts_it_any_more() -> None:
    lost = completed(nodes(LOST))
    assert completed(nodes({"packets": 9}), condition(lost)) == lost
    assert completed([], condition(lost)) == lost


def test_that_nothing_was_lost_stays_so_when_the_nodes_are_gone() -> None:
    whole = completed(nodes({"packets": 9}))
    assert completed([], condition(whole)) == whole
    assert completed(nodes(LOST), condition(whole)).reason == "PacketsDropped"


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (("n8",), "node n8 no longer exists, and what was captured there"),
        (("n9", "n8", "n7"), "node n7 and 2 more nodes no longer exist, and"),
    ],
)
def test_what_was_captured_on_a_node_that_is_gone_is_lost(gone: tuple[str, ...], words: str) -> None:
    whole = condition(completed(nodes({"packets": 9})))
    found = completed(nodes({"packets": 9}), whole, gone=gone)
    assert (found.status, found.reason) == ("False", "NodeGone")
    assert found.message.startswith(words)
    assert completed(nodes({"packets": 9}), condition(found)) == found


@pytest.mark.parametrize(
    "trouble",
    [
        {"state": "Error", "reason": "DiskPressure", "message": "no room"},
        {"state": "Error", "reason": "AgentSilent", "message": "no room"},
        {"state": "Capturing", "reason": "WriteFailed", "message": "no room"},
    ],
)
def test_while_a_node_is_in_trouble_nobody_says_that_nothing_was_lost(trouble: Json) -> None:
    whole = condition(completed(nodes({"packets": 9})))
    found = completed(nodes({"packets": 9}, trouble | {"packets": 9}), whole)
    assert found == Finding("Unknown", "NodesInTrouble", "it is not known what was lost on node n1: no room")
    assert completed(nodes({"packets": 9}, {"packets": 9}), condition(found)).status == "True"


FULL = {"state": "Error", "reason": "DiskPressure", "message": "90 MB are free and 100 MB must be"}
FOREIGN = {"state": "Error", "reason": "HostNetwork", "message": "pod x uses the node's network"}
PARTLY = {"state": "Capturing", "reason": "OptedOut", "message": "3 of 4 pods; pod y has the label"}


def test_disk_pressure_names_the_nodes_and_what_the_first_says() -> None:
    assert disk_pressure(nodes({}, FULL, FULL)) == Finding(
        "True", "DiskPressure", "on node n1 and 1 more node: 90 MB are free and 100 MB must be"
    )
    assert disk_pressure(nodes({}, FOREIGN)).status == "False"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([{}, {"state": "WaitingForTraffic", "reason": "FilterMatchedNothing"}], ("False", "AsExpected", "")),
        ([{}, {"state": "WaitingForTraffic", "reason": "PodHasNoAddress"}], ("False", "AsExpected", "")),
        ([{"state": "Scheduled", "reason": "Suspended"}], ("False", "AsExpected", "")),
        ([{}, FOREIGN], ("True", "HostNetwork", "on node n1: pod x uses the node's network")),
        ([PARTLY], ("True", "OptedOut", "on node n0: 3 of 4 pods; pod y has the label")),
        (
            [PARTLY, PARTLY, FULL, FOREIGN, FOREIGN],
            (
                "True",
                "HostNetwork",
                "on node n3 and 1 more node: pod x uses the node's network; "
                "on node n2: 90 MB are free and 100 MB must be; "
                "on node n0 and 1 more node: 3 of 4 pods; pod y has the label",
            ),
        ),
        ([{"state": "Error"}], ("True", "NodeFailed", "on node n0: NodeFailed")),
    ],
)
def test_degraded(said: list[Json], expected: tuple[str, str, str]) -> None:
    found = degraded(nodes(*said))
    assert (found.status, found.reason) == expected[:2]
    assert found.message == (expected[2] or "every node does what it should")


def test_however_many_kinds_of_trouble_there_are_three_are_told() -> None:
    found = degraded(nodes(*({"state": "Error", "reason": f"Reason{number}"} for number in range(9))))
    assert found.message == "on node n0: Reason0; on node n1: Reason1; on node n2: Reason2; and 6 other reasons"
