"""When a status is written, and what is made of a capture that can't be read."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from api.packetcapture import NodeSummary, PacketCapture, PacketCaptureStatus
from controller.captures import Captures, Unreadable, read, write_at
from controller.events import Events
from kube.status import StatusError
from tests.controller.cases import START, after, capture

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
    at = write_at(OLD, wanted, last=last, spacing=spacing, counters_interval=MINUTE, now=after(seconds=10))
    assert at == expected


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
