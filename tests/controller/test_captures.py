"""When a status is written, and what is made of a capture that can't be read."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from api.packetcapture import NodeSummary, PacketCapture, PacketCaptureStatus
from controller.captures import Captures, Headlines, Unreadable, first_written, read, write_at
from controller.events import Events
from kube.status import StatusError
from tests.controller.cases import START, after, capture, node

MINUTE = timedelta(minutes=1)
OLD = PacketCaptureStatus(phase="Capturing", packets=1, nodes=[NodeSummary(node="a", state="Capturing", packets=1)])


@pytest.mark.parametrize(
    ("wanted", "last", "expected"),
    [
        (OLD, START, None),
        (OLD.model_copy(update={"phase": "Finished"}), after(seconds=10), after(seconds=10)),
        (OLD.model_copy(update={"pods": 2}), after(seconds=10), after(seconds=15)),
        (OLD.model_copy(update={"pods": 2}), after(seconds=2), after(seconds=10)),
        (OLD.model_copy(update={"packets": 2}), after(hours=1), after(minutes=1, seconds=10)),
        (OLD.model_copy(update={"packets": 2}), START, after(minutes=1)),
        (OLD.model_copy(update={"bytes": 2}), after(minutes=-5), after(seconds=10)),
        (OLD.model_copy(update={"packets": 2}), None, after(seconds=10)),
        (
            OLD.model_copy(update={"nodes": [NodeSummary(node="a", state="Capturing", packets=2)]}),
            START,
            after(minutes=1),
        ),
        (
            OLD.model_copy(update={"nodes": [NodeSummary(node="a", state="Error", packets=1)]}),
            after(seconds=10),
            after(seconds=15),
        ),
    ],
    ids=[
        "nothing new",
        "phase",
        "pods",
        "pods, some time ago",
        "packets, and the clock was set back",
        "packets",
        "bytes, long ago",
        "never written",
        "a node's packets",
        "a node's state",
    ],
)
def test_what_holds_for_all_is_written_at_once_states_of_nodes_soon_and_counters_now_and_then(
    wanted: PacketCaptureStatus, last: datetime | None, expected: datetime | None
) -> None:
    spacing = timedelta(seconds=5)
    at = write_at(
        OLD,
        wanted,
        last=last,
        headline_at=START,
        spacing=spacing,
        counters_interval=MINUTE,
        now=after(seconds=10),
    )
    assert at == expected


def test_a_headline_that_changes_all_the_time_waits_for_its_turn() -> None:
    spacing = timedelta(seconds=2)
    now, left = START, Headlines(START)
    written: list[float] = []
    while len(written) < 8:
        if left.next(spacing, now) <= now:
            written.append((now - START).total_seconds())
            left = left.after(spacing, now)
        now += timedelta(seconds=0.25)
    assert written == [0, 0.25, 0.5, 0.75, 1, 2, 4, 6]
    wanted = OLD.model_copy(update={"phase": "Error"})
    due = left.next(spacing, now)
    given = {"last": START, "spacing": spacing, "counters_interval": MINUTE, "now": now}
    assert write_at(OLD, wanted, headline_at=due, **given) == due > now  # type: ignore[arg-type]


def test_a_headline_does_not_wait_for_long_when_the_clock_was_set_back() -> None:
    spacing = timedelta(seconds=1)
    left = Headlines(START).after(spacing, after(hours=1))
    assert left.next(spacing, START) <= after(seconds=1)


def test_a_new_leader_does_not_write_all_that_others_wrote_at_once() -> None:
    moments = [first_written(f"uid-{number}", began=START, interval=MINUTE) for number in range(100)]
    assert all(START - MINUTE <= moment <= START for moment in moments)
    quarters = {int((START - moment) / (MINUTE / 4)) for moment in moments}
    assert quarters == {0, 1, 2, 3}


async def test_what_another_leader_wrote_is_written_again_when_its_time_has_come() -> None:
    server: Any = Refusing()
    captures = Captures(server, events=Events(server, instance="i"), counters_interval=MINUTE, clock=lambda: START)
    condition = {"type": "Admitted", "status": "True", "reason": "x", "lastTransitionTime": START}
    known = capture("web", status={"conditions": [condition]})
    (due,) = await captures._write(known, known.status.model_copy(update={"bytes": 1}), START)
    assert START < due <= after(minutes=1)
    assert server.written == []
    assert await captures._write(known, known.status.model_copy(update={"bytes": 1}), due) == []
    assert len(server.written) == 1


def test_how_many_agents_there_are_is_told_when_it_has_changed_much() -> None:
    server: Any = Refusing()
    captures = Captures(server, events=Events(server, instance="i"), counters_interval=MINUTE, clock=lambda: START)
    touched = []
    for number in range(1, 31):
        captures._reports.put(node(f"n{number}"), START)
        before = captures._agents_told
        captures._count_agents()
        if captures._agents_told != before:
            touched.append(number)
    assert touched == [1, 2, 3, 4, 5, 7, 9, 11, 14, 17, 21, 26]


def test_a_capture_whose_spec_is_wrong_is_kept_with_the_reason() -> None:
    item = {
        "metadata": {"name": "web", "uid": "u", "generation": 3},
        "spec": {"selector": "app =="},
        "status": {"packets": 5},
    }
    found = read(item)
    assert isinstance(found, Unreadable)
    assert (found.metadata.generation, found.status.packets) == (3, 5)
    assert found.message.startswith("spec: selector: column 7")
    assert isinstance(read(item | {"spec": {"selector": "all()"}}), PacketCapture)


def test_a_status_that_can_not_be_read_is_replaced() -> None:
    found = read({"metadata": {"name": "web", "uid": "u"}, "spec": {}, "status": {"packets": "many"}})
    assert isinstance(found, Unreadable)
    assert found.status == PacketCaptureStatus()


class Refusing:
    """kube-apiserver, which takes no status with packets in it."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    async def replace(self, _: object, name: str, body: dict[str, Any], **__: object) -> dict[str, Any]:
        if body["status"]["packets"]:
            raise StatusError(422, f"PacketCapture {name} is invalid")
        self.written.append(body["status"])
        metadata = body["metadata"] | {"resourceVersion": "2"}
        return {"metadata": metadata, "spec": {"selector": "all()"}, "status": body["status"]}


async def test_when_kube_apiserver_refuses_the_numbers_what_holds_is_written_without_them() -> None:
    server: Any = Refusing()
    captures = Captures(server, events=Events(server, instance="i"), counters_interval=MINUTE)
    status = OLD.model_copy(update={"phase": "Capturing", "packets": 10**19})
    assert await captures._write(capture("web"), status, START) == []
    assert [(written["phase"], written["packets"], written["nodes"]) for written in server.written] == [
        ("Capturing", 0, [])
    ]
