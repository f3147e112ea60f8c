"""What nodes report, found by capture; what a report changes; and who is silent."""

from datetime import datetime

import pytest

from api.object import ObjectMeta
from api.packetcapture import NodeSummary
from controller.reports import GRACE, SILENT_AFTER, Changed, Reports, Said, read
from tests.controller.cases import START, Json, after, node

OTHER = {"name": "other", "uid": "uid-other"}


def of(reports: Reports, name: str = "web") -> list[Said]:
    return reports.of(ObjectMeta(namespace="dev", name=name, uid=f"uid-{name}"))


def put(reports: Reports, name: str, *said: Json, at: datetime = START, heard: datetime | None = None) -> Changed:
    """The node says this `at` a moment of our clock; its own says `heard`."""
    return reports.put(node(name, *said, heard=heard or at), at)


def states(reports: Reports) -> dict[str, tuple[str, str]]:
    return {said.node: (said.state, said.reason) for said in of(reports)}


def test_captures_are_found_on_all_their_nodes_and_on_no_other() -> None:
    reports = Reports()
    put(reports, "a", {}, OTHER)
    put(reports, "b", {})
    assert {said.node for said in of(reports)} == {"a", "b"}
    assert {said.node for said in of(reports, "other")} == {"a"}
    assert of(reports, "none") == []
    assert reports.agents == 2


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ([{}, OTHER], Changed()),
        ([{"packets": 9, "bytes": 9, "seen": 9, "message": "9"}, OTHER], Changed(numbers={"uid-web"})),
        ([{"pods": 1}, OTHER], Changed(states={"uid-web"})),
        ([{"state": "Error"}, OTHER], Changed(states={"uid-web"})),
        ([{"dropped": 1}, OTHER], Changed(states={"uid-web"})),
        ([{"interruptions": 1}, OTHER], Changed(states={"uid-web"})),
        ([{"packets": 6}], Changed(states={"uid-other"}, numbers={"uid-web"})),
        ([{}, OTHER, {"uid": "uid-new"}], Changed(states={"uid-new"})),
    ],
    ids=["nothing", "numbers", "pods", "state", "the first loss", "the first interruption", "one is gone", "a new one"],
)
def test_a_report_says_which_captures_it_changed(said: list[Json], changed: Changed) -> None:
    reports = Reports()
    put(reports, "a", {"packets": 5}, OTHER)
    report = [said[0] | {"packets": said[0].get("packets", 5)}, *said[1:]]
    assert put(reports, "a", *report, at=after(seconds=30)) == changed


def test_a_node_that_is_gone_takes_its_reports_with_it() -> None:
    reports = Reports()
    put(reports, "a", {}, OTHER)
    put(reports, "b", {})
    assert reports.remove("a") == Changed(states={"uid-web", "uid-other"})
    assert states(reports) == {"b": ("Capturing", "")}
    assert (of(reports, "other"), reports.agents) == ([], 1)
    assert reports.remove("a") == Changed()


def test_a_node_falls_silent_and_speaks_again() -> None:
    reports = Reports()
    put(reports, "a", {"packets": 5, "pods": 1})
    put(reports, "b", {})
    silent = START + SILENT_AFTER
    put(reports, "b", {}, at=silent)
    assert reports.listen(silent) == Changed(states={"uid-web"})
    assert reports.listen(silent) == Changed(), "it is told once"
    assert states(reports) == {"a": ("Error", "AgentSilent"), "b": ("Capturing", "")}
    assert reports.agents == 1
    (said,) = (said for said in of(reports) if said.node == "a")
    assert (said.packets, said.pods) == (5, 0)
    put(reports, "a", {}, at=after(minutes=3))
    reports.listen(after(minutes=3))
    assert states(reports)["a"] == ("Capturing", "")


@pytest.mark.parametrize("clock", [after(hours=-1), after(hours=1)], ids=["behind", "ahead"])
def test_a_node_whose_clock_is_wrong_is_not_silent_while_it_speaks(clock: datetime) -> None:
    reports = Reports()
    for minute in range(4):
        put(reports, "a", {}, at=after(minutes=minute), heard=clock + (after(minutes=minute) - START))
        reports.listen(after(minutes=minute))
        assert reports.agents == 1
    reports.listen(after(minutes=3) + SILENT_AFTER)
    assert reports.agents == 0


def test_after_a_time_without_kube_apiserver_agents_have_the_time_to_speak() -> None:
    reports = Reports()
    put(reports, "a", {}, heard=after(hours=-1))
    reports.listen(START)
    assert reports.agents == 1
    reports.listen(START + GRACE)
    assert reports.agents == 0


def test_when_our_clock_was_set_back_silence_is_counted_from_then_on() -> None:
    reports = Reports()
    put(reports, "a", {})
    back = after(days=-1)
    reports.listen(back)
    reports.listen(back + SILENT_AFTER)
    assert reports.agents == 0


def test_what_finished_stays_so_on_a_silent_node() -> None:
    reports = Reports()
    put(reports, "a", {"state": "Finished"})
    reports.listen(START + SILENT_AFTER)
    assert states(reports) == {"a": ("Finished", "")}


@pytest.mark.parametrize(
    "bad",
    [{"state": "Paused"}, {"message": "m" * 513}, {"packets": 10**19}, {"packets": -1}, {"reason": "no word"}],
    ids=["an unknown state", "a long message", "a number beyond counting", "a negative number", "no word"],
)
def test_a_report_that_can_not_be_read_is_trouble_of_its_capture_and_of_no_other(bad: Json) -> None:
    reports = Reports()
    put(reports, "a", {"packets": 5, "pods": 1}, OTHER)
    report = node("a", bad, OTHER, heard=after(seconds=1))
    assert report.unreadable == 1
    assert reports.put(report, after(seconds=1)) == Changed(states={"uid-web"})
    (said,) = of(reports)
    assert (said.state, said.reason, said.packets, said.pods) == ("Error", "ReportUnreadable", 5, 0)
    assert [one.state for one in of(reports, "other")] == ["Capturing"]
    put(reports, "a", {"packets": 6, "pods": 1}, OTHER, at=after(seconds=2))
    assert [(one.state, one.packets) for one in of(reports)] == [("Capturing", 6)]


def test_a_report_of_which_not_even_the_capture_is_known_is_counted() -> None:
    item = {"metadata": {"name": "a"}, "status": {"reports": ["nonsense", "[]", '{"uid": 7}', '"\\ud800"']}}
    found = read(item)
    assert (found.unreadable, found.captures) == (4, {})


def test_a_node_that_can_not_be_read_keeps_what_it_said_last_and_is_in_trouble() -> None:
    reports = Reports()
    put(reports, "a", {"packets": 5, "pods": 1})
    assert reports.spoil("a") == Changed(states={"uid-web"})
    assert reports.spoil("a") == Changed(), "it is told once"
    (said,) = of(reports)
    assert (said.state, said.reason, said.packets, said.pods) == ("Error", "ReportUnreadable", 5, 0)
    assert put(reports, "a", {"packets": 5, "pods": 1}, at=after(seconds=1)) == Changed(states={"uid-web"})
    assert states(reports) == {"a": ("Capturing", "")}


def test_what_has_a_captures_uid_but_not_its_name_is_of_no_use_and_counted() -> None:
    reports = Reports()
    put(reports, "a", {"namespace": "elsewhere"})
    put(reports, "b", {"name": "other"})
    put(reports, "c", {})
    assert states(reports) == {"c": ("Capturing", "")}
    assert [reports.foreign for _ in range(2) if of(reports)] == [2, 2]
    reports.remove("a")
    assert reports.foreign == 1


def test_a_node_that_is_gone_with_packets_is_remembered_as_long_as_the_capture_is_there() -> None:
    reports = Reports()
    web = ObjectMeta(namespace="dev", name="web", uid="uid-web")
    put(reports, "a", {"packets": 5})
    put(reports, "b", {})
    reports.remove("a")
    reports.remove("b")
    reports.retain(["uid-web"])
    assert reports.gone(web, []) == {"a"}
    reports.retain([])
    assert reports.gone(web, []) == set()


def test_a_new_leader_takes_a_node_for_silent_that_was_so_until_it_speaks() -> None:
    reports = Reports()
    web = ObjectMeta(namespace="dev", name="web", uid="uid-web")
    dead = after(hours=-5)
    put(reports, "a", {"pods": 1, "packets": 5}, heard=dead)
    put(reports, "b", {"pods": 1}, heard=dead)
    reports.listen(START)
    written = [NodeSummary(node="a", state="Error", reason="AgentSilent"), NodeSummary(node="b", state="Capturing")]
    silent, fine = reports.of(web, written)
    assert (silent.reason, silent.message) == (
        "AgentSilent",
        "the node's agent has said nothing since 2029-12-31T19:00:00Z",
    )
    assert fine.state == "Capturing", "of the other node it is not known yet"
    put(reports, "a", {"pods": 1, "packets": 5}, at=after(seconds=1))
    reports.listen(after(seconds=1))
    assert [said.state for said in reports.of(web, written)] == ["Capturing", "Capturing"]
    reports.listen(START + GRACE)
    assert states(reports) == {"a": ("Capturing", ""), "b": ("Error", "AgentSilent")}
