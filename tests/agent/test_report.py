"""When the node's object is written, with a clock of the test's."""

import asyncio
import json
from typing import Any

import pytest

from agent.report import Facts, Intervals, Reporter, Spread, fitting, pace
from api.capturenode import Disk, NodeCapture

INTERVALS = Intervals(states=1, counters=10, heartbeat=30)


def facts(**changes: object) -> Facts:
    values: dict[str, object] = {"namespace": "dev", "name": "c", "uid": "u", "state": "Capturing", "packets": 1}
    return Facts((NodeCapture.model_validate(values | changes),))


WRITTEN = facts()


@pytest.mark.parametrize(
    ("current", "seconds_since", "wait"),
    [
        # nothing changed: a sign of life
        (WRITTEN, 0, 30),
        (WRITTEN, 29, 1),
        (WRITTEN, 30, 0),
        # only counters
        (facts(packets=2), 0, 10),
        (facts(packets=2), 12, 0),
        (facts(bytes=5, files=3, dropped=2), 4, 6),
        # something that a person waits for
        (facts(state="Error"), 0, 1),
        (facts(state="Error"), 1, 0),
        (facts(reason="HostNetwork"), 5, 0),
        (facts(message="other"), 5, 0),
        (facts(pods=2), 5, 0),
        (facts(matched=2), 5, 0),
        (facts(interruptions=1), 5, 0),
        (facts(evicted=1), 5, 0),
        (Facts(), 5, 0),
        (Facts((*WRITTEN.captures, *facts(uid="v").captures)), 5, 0),
        # the disk is a counter that nobody waits for
        (Facts(WRITTEN.captures, Disk(capacity=3, free=2, used=1)), 12, 18),
    ],
)
def test_states_are_written_at_once_and_counters_seldom(current: Facts, seconds_since: float, wait: float) -> None:
    now = 1000.0 + seconds_since
    given = {"written": WRITTEN, "written_at": 1000.0, "changed_at": now, "intervals": INTERVALS}
    assert pace(current=current, now=now, **given) == wait  # type: ignore[arg-type]


def test_how_many_packets_a_filter_held_back_is_a_counter_and_that_it_does_is_a_state() -> None:
    def matched_nothing(seen: int) -> Facts:
        message = f"filter matched 0 of {seen} packets"
        return facts(reason="FilterMatchedNothing", message=message, seen=seen, packets=0)

    def wait(current: Facts, written: Facts) -> float:
        return pace(written=written, written_at=1000, current=current, changed_at=1005, now=1005, intervals=INTERVALS)

    assert wait(matched_nothing(2), matched_nothing(1)) == 5
    assert wait(matched_nothing(1), facts(reason="NoPacketYet", packets=0)) == 0


def test_the_first_report_does_not_wait() -> None:
    given = {"written": None, "written_at": float("-inf"), "changed_at": 0.0, "intervals": INTERVALS}
    assert pace(current=Facts(), now=0, **given) == 0  # type: ignore[arg-type]


def test_agents_that_all_have_something_to_tell_share_the_time() -> None:
    """However often states change, a thousand agents together stay below 200 writes a second."""
    seconds = Spread.of(1000, share=0).seconds
    assert 1000 / seconds < 200
    changed = facts(state="Error")

    def wait(share: float, *, written_at: float, now: float) -> float:
        spread = Spread.of(1000, share=share)
        given = {"written": WRITTEN, "written_at": written_at, "changed_at": 1000.0, "intervals": INTERVALS}
        return pace(current=changed, now=now, spread=spread, **given)  # type: ignore[arg-type]

    assert wait(0.0, written_at=0, now=1000) == 0
    assert wait(0.5, written_at=0, now=1000) == pytest.approx(seconds / 2)
    assert wait(0.5, written_at=0, now=1000 + seconds) == 0
    assert wait(0.0, written_at=999, now=1000) == pytest.approx(seconds - 1), "one that has just written waits"


def test_two_agents_hardly_wait_for_each_other() -> None:
    assert Spread.of(2, share=1.0).seconds < 0.1


def many(namespace: str, count: int, *, state: str = "Capturing", **said: object) -> list[NodeCapture]:
    about = {"namespace": namespace, "state": state, "message": "m" * 500}
    names = [f"{state.lower()}-{number:04}" for number in range(count)]
    return [NodeCapture.model_validate(about | said | {"name": name, "uid": f"{namespace}-{name}"}) for name in names]


def reported(captures: list[NodeCapture], **limits: int) -> tuple[list[str], int]:
    reports, omitted = fitting(captures, **limits)
    return [NodeCapture.read(report).uid for report in reports], omitted


def test_reports_for_which_there_is_room_keep_their_order() -> None:
    captures = many("b", 3) + many("a", 2, state="Finished")
    assert reported(captures) == ([capture.uid for capture in captures], 0)


def test_however_many_captures_there_are_etcd_takes_what_is_reported_of_them() -> None:
    reports, omitted = fitting(many("a", 5000, message="é" * 512))
    assert len(json.dumps(reports, ensure_ascii=False).encode()) < 750_000
    assert omitted == 5000 - len(reports) > 0
    assert len(fitting(many("a", 5000, message=""))[0]) <= 2000, "so many the CustomResourceDefinition takes"


def test_what_runs_goes_before_what_is_over() -> None:
    captures = many("a", 10, state="Finished") + many("b", 10) + many("c", 10, state="Error")
    room = sum(len(json.dumps(capture.written())) + 1 for capture in captures[10:])
    assert reported(captures, size=room) == ([capture.uid for capture in captures[10:]], 10)


def test_who_makes_many_captures_takes_the_room_from_himself() -> None:
    uids, omitted = reported(many("crowd", 1000) + many("small", 3), size=20_000)
    assert [uid for uid in uids if uid.startswith("small")] == [capture.uid for capture in many("small", 3)]
    assert omitted > 900


class Listening:
    """kube-apiserver, which keeps what is applied."""

    def __init__(self) -> None:
        self.applied: list[dict[str, Any]] = []

    async def get(self, *_: object) -> dict[str, Any]:
        return {"metadata": {"uid": "node-uid"}}

    async def apply(self, _: object, __: str, body: dict[str, Any], **___: object) -> None:
        self.applied.append(body["status"])


async def test_nothing_is_written_before_it_is_known_what_is_captured() -> None:
    server: Any = Listening()
    written = asyncio.Event()
    reporter = Reporter(server, node="n", pod="p", version="v", intervals=INTERVALS, on_write=lambda _: written.set())
    running = asyncio.create_task(reporter.run())
    for _ in range(10):
        await asyncio.sleep(0)
    assert server.applied == []
    reporter.update(WRITTEN.captures)
    async with asyncio.timeout(10):
        await written.wait()
    running.cancel()
    assert [status["reports"] for status in server.applied] == [[WRITTEN.captures[0].written()]]
