"""What is told of a capture: each change once."""

import asyncio
from typing import Any

import pytest

from api.object import Condition, ObjectMeta
from api.packetcapture import PacketCaptureStatus, Phase
from controller.events import (
    BURST,
    BURST_OF_ALL,
    REFILL,
    Allowance,
    Events,
    Transition,
    event,
    started_by,
    transitions,
)
from tests.controller.cases import START, after, capture

REGARDING = ObjectMeta(name="web", namespace="dev", uid="u", resource_version="7")


def status(phase: Phase, *, interruptions: int = 0, **conditions: tuple[str, str]) -> PacketCaptureStatus:
    """With these conditions, as status and reason."""
    told = [
        Condition.model_validate(
            {
                "type": kind,
                "status": holds,
                "reason": reason,
                "message": f"message of {reason}",
                "lastTransitionTime": START,
            }
        )
        for kind, (holds, reason) in conditions.items()
    ]
    return PacketCaptureStatus(phase=phase, conditions=told, interruptions=interruptions)


ADMITTED = ("True", "WithinLimit")
NEW = PacketCaptureStatus()
QUEUED = status("Scheduled", Admitted=("False", "QuotaExceeded"), Capturing=("False", "QuotaExceeded"))
LATER = status("Scheduled", Admitted=ADMITTED, Capturing=("False", "BeforeStartTime"))
STARTING = status("Scheduled", Admitted=ADMITTED, Capturing=("False", "Starting"))
RUNNING = status("Capturing", Admitted=ADMITTED, Capturing=("True", "Capturing"))
WAITING = status("WaitingForTraffic", Admitted=ADMITTED, Capturing=("True", "NoPacketYet"))
SUSPENDED = status("Scheduled", Admitted=("False", "Suspended"), Capturing=("False", "Suspended"))
FINISHED = status("Finished", Admitted=("False", "Ended"), Capturing=("False", "Ended"))
DELETED = status("Scheduled", Admitted=("False", "Deleted"), Capturing=("False", "Deleted"))
REFUSED = status("Error", Admitted=("False", "NotStamped"), Capturing=("False", "NotStamped"))
UNREADABLE = status("Error", Admitted=("False", "SpecUnreadable"), Capturing=("False", "SpecUnreadable"))


def reasons(before: PacketCaptureStatus, after: PacketCaptureStatus) -> list[tuple[str, str]]:
    return [(one.type, one.reason) for one in transitions(before, after, started_by="user alice, policy baseline")]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (NEW, STARTING, [("Normal", "Started")]),
        (NEW, WAITING, [("Normal", "Started")]),
        (NEW, LATER, []),
        (LATER, STARTING, [("Normal", "Started")]),
        (STARTING, WAITING, []),
        (WAITING, RUNNING, []),
        (NEW, QUEUED, [("Warning", "QuotaExceeded")]),
        (QUEUED, RUNNING, [("Normal", "Started")]),
        (RUNNING, SUSPENDED, [("Normal", "Suspended")]),
        (SUSPENDED, STARTING, [("Normal", "Resumed")]),
        (SUSPENDED, FINISHED, [("Normal", "Finished")]),
        (RUNNING, FINISHED, [("Normal", "Finished")]),
        (FINISHED, RUNNING, [("Normal", "Started")]),
        (NEW, REFUSED, [("Warning", "NotStamped")]),
        (NEW, UNREADABLE, [("Warning", "SpecUnreadable")]),
        (RUNNING, DELETED, []),
        (SUSPENDED, DELETED, []),
        (RUNNING, RUNNING, []),
    ],
)
def test_how_far_a_capture_has_come(
    before: PacketCaptureStatus, after: PacketCaptureStatus, expected: list[tuple[str, str]]
) -> None:
    assert reasons(before, after) == expected


FINE = {
    "Complete": ("True", "AllPacketsKept"),
    "DiskPressure": ("False", "DiskHasRoom"),
    "Degraded": ("False", "AsExpected"),
}
PRESSED = {"DiskPressure": ("True", "DiskPressure"), "Degraded": ("True", "DiskPressure")}
FOREIGN = {"Degraded": ("True", "HostNetwork")}
SILENT = {"Degraded": ("True", "AgentSilent")}
LOSSY = {"Complete": ("False", "PacketsDropped")}
INTERRUPTED = {"Complete": ("False", "Interrupted")}


@pytest.mark.parametrize(
    ("before", "after", "interruptions", "expected"),
    [
        ({}, PRESSED, 0, [("Warning", "DiskPressure")]),
        (PRESSED, {}, 0, [("Normal", "DiskHasRoom")]),
        ({}, FOREIGN, 0, [("Warning", "HostNetwork")]),
        (FOREIGN, SILENT, 0, [("Warning", "AgentSilent")]),
        (FOREIGN, FOREIGN, 0, []),
        (FOREIGN, {}, 0, [("Normal", "Recovered")]),
        ({}, LOSSY, 0, [("Warning", "PacketsDropped")]),
        (LOSSY, LOSSY, 0, []),
        (LOSSY, {}, 0, []),
        ({}, INTERRUPTED, 1, [("Warning", "Interrupted")]),
        (LOSSY, LOSSY, 1, [("Warning", "Interrupted")]),
    ],
)
def test_trouble_begins_and_ends(
    before: dict[str, tuple[str, str]],
    after: dict[str, tuple[str, str]],
    interruptions: int,
    expected: list[tuple[str, str]],
) -> None:
    running = {"Admitted": ADMITTED, "Capturing": ("True", "Capturing")}
    old = status("Capturing", interruptions=0, **(running | FINE | before))
    new = status("Capturing", interruptions=interruptions, **(running | FINE | after))
    assert reasons(old, new) == expected


def test_who_started_a_capture_is_told_by_its_stamp() -> None:
    assert started_by(capture("web").metadata) == "user alice, policy baseline"
    assert started_by(capture("web", policy=None).metadata) == "an unknown user"
    (told,) = transitions(NEW, RUNNING, started_by="user alice, policy baseline")
    assert told.note == "started by user alice, policy baseline"


def test_an_event_has_the_name_of_its_change() -> None:
    told = Transition("Warning", "NotStamped", "Admitting", "no stamp")
    first = event(REGARDING, told, instance="pod-0", now=START)
    again = event(REGARDING, told, instance="pod-1", now=after(seconds=5))
    later = event(REGARDING.model_copy(update={"resource_version": "8"}), told, instance="pod-0", now=START)
    assert first["metadata"]["name"] == again["metadata"]["name"] != later["metadata"]["name"]
    assert first["eventTime"] == "2030-01-01T00:00:00.000000Z"
    assert first["regarding"]["uid"] == "u"


def test_an_event_is_cut_to_what_kubernetes_takes() -> None:
    long = REGARDING.model_copy(update={"name": "a" * 235 + "." + "b" * 17})
    made = event(long, Transition("Normal", "Started", "Starting", "x" * 2000), instance="pod-0", now=START)
    assert len(made["metadata"]["name"]) <= 253
    assert ".." not in made["metadata"]["name"]
    assert len(made["note"].encode()) == 1024
    assert made["note"].endswith("x…")


@pytest.mark.parametrize("character", ["é", "…", "🦈"])
def test_an_event_is_cut_by_bytes_as_kube_apiserver_counts(character: str) -> None:
    long = Transition("Warning", "R" * 200, "Capturing", character * 600)
    made = event(REGARDING, long, instance="pod-0", now=START)
    assert 1020 < len(made["note"].encode()) <= 1024
    assert set(made["note"]) == {character, "…"}
    assert len(made["reason"].encode()) == 128


async def test_what_one_node_does_to_all_captures_is_told_of_some() -> None:
    server: Any = Keeping()
    events = Events(server, instance="i")
    running = asyncio.create_task(events.run())
    for number in range(BURST_OF_ALL + 50):
        events.send(REGARDING.model_copy(update={"uid": f"u{number}"}), [Transition("Normal", "R", "A", "n")])
    async with asyncio.timeout(10):
        while len(server.told) < BURST_OF_ALL:  # noqa: ASYNC110 - what is waited for is in another task
            await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    running.cancel()
    assert len(server.told) < BURST_OF_ALL + 50


class Keeping:
    """kube-apiserver, which keeps the events that it is sent."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def create(self, _: object, body: Any, **__: object) -> None:
        self.told.append(body)


def test_a_capture_has_a_burst_of_events_and_then_one_now_and_then() -> None:
    allowance = Allowance()
    assert [allowance.take("u", 0.0) for _ in range(BURST + 2)] == [True] * BURST + [False] * 2
    assert allowance.take("other", 0.0), "each capture has its own"
    assert not allowance.take("u", REFILL / 2)
    assert allowance.take("u", REFILL)
    assert not allowance.take("u", REFILL)
