"""Counters that survive whatever dies: told by runs, as the capturer would tell."""

import uuid
from datetime import UTC, datetime

import pytest

from agent.capturer.protocol import FileStatus, InterfaceStatus, State, Target, TargetStatus
from agent.store import FileRecord
from agent.tally import Count, CountersError, Tally, parse
from api.names import file_name, format_time

NOW = datetime(2026, 12, 1, 10, tzinfo=UTC)
CAPTURE = str(uuid.uuid4())
POD = str(uuid.uuid4())
TARGET = Target(capture_uid=CAPTURE, pod_uid=POD, pod_name="web-0", pod_addresses=("10.0.0.1",))


def name(sequence: int) -> str:
    return file_name(pod="web-0", interface="eth0", created_ns=sequence, pod_uid=POD, sequence=sequence)


def told(
    packets: int, *, run: int = 1, files: dict[int, int] | None = None, dropped: int = 0, state: State = State.CAPTURING
) -> TargetStatus:
    """A run with so many packets, of which so many are in each file."""
    listed = tuple(
        FileStatus(
            name=name(sequence),
            interface="eth0",
            created=sequence,
            size=24 + 100 * count,
            packets=count,
            dropped=0,
            last_batch_offset=24,
        )
        for sequence, count in (files or {}).items()
    )
    interface = InterfaceStatus(
        interface="eth0", state=state, packets=packets, dropped=dropped, seen=10 * packets, files=listed
    )
    return TargetStatus(target=TARGET, started=run, state=state, interfaces=(interface,))


def record(sequence: int, packets: int, *, run: int = 1, dropped: int = 0) -> FileRecord:
    return FileRecord(
        node="n",
        pod="web-0",
        interface="eth0",
        name=name(sequence),
        size=24 + 100 * packets,
        packets=packets,
        dropped=dropped,
        pod_uid=POD[:8],
        addresses=[],
        filter="",
        snap_length=None,
        run=run,
        opened=format_time(sequence),
        closed=format_time(sequence),
        recovered=True,
    )


def total(tally: Tally) -> tuple[int, int]:
    count = tally.of(CAPTURE).total
    return count.packets, count.dropped


def restarted(tally: Tally, *records: FileRecord, running: TargetStatus | None = None) -> Tally:
    """Another agent, which finds what this one kept."""
    kept = tally.unsaved(urgent=False).get(CAPTURE)
    made = Tally()
    if running is not None:
        made.observe(running)
    made.load(CAPTURE, parse(kept) if kept is not None else None, records, now=NOW)
    return made


@pytest.fixture
def tally() -> Tally:
    return Tally()


def test_what_is_told_again_counts_once(tally: Tally) -> None:
    assert tally.observe(told(5, files={0: 5}, dropped=1)) == Count(5, 1, 50, 524)
    assert tally.observe(told(7, files={0: 7}, dropped=1)) == Count(2, 0, 20, 200)
    assert tally.observe(told(7, files={0: 7}, dropped=1)) == Count()
    tally.observe(told(3, run=2, files={1: 3}))
    assert tally.of(CAPTURE).total == Count(10, 1, 100)
    assert tally.of("other").total == Count()


def test_bytes_of_files_that_were_rotated_away_stay_written(tally: Tally) -> None:
    tally.observe(told(5, files={0: 5}))
    assert tally.observe(told(9, files={1: 4})).size == 24 + 400


def test_a_run_that_is_stopping_counts_when_it_has_stopped(tally: Tally) -> None:
    tally.observe(told(5, files={0: 5}))
    tally.observe(told(9, files={0: 5}, state=State.STOPPING))
    assert total(tally) == (5, 0)
    tally.observe(told(9, files={0: 9}, state=State.STOPPED))
    assert total(tally) == (9, 0)


def test_after_the_workers_death_a_file_may_hold_more_than_was_told(tally: Tally) -> None:
    tally.observe(told(50, files={0: 10}))  # 40 more in files that are rotated away
    tally.end(told(50, files={0: 10}))
    tally.interrupt(CAPTURE, now=NOW)
    for _ in range(2):
        tally.settle(CAPTURE, record(0, 13))
        tally.settle(CAPTURE, record(1, 4))  # begun just before, and never told
    assert total(tally) == (57, 0)
    assert (tally.of(CAPTURE).interruptions, tally.of(CAPTURE).interrupted_at) == (1, NOW)


def test_what_a_node_lost_with_its_page_cache_is_dropped(tally: Tally) -> None:
    tally.observe(told(50, files={0: 10}, dropped=3))
    after = restarted(tally, record(0, 8))
    assert total(after) == (48, 5)


def test_an_agent_that_was_killed_goes_on_with_what_the_capturer_says(tally: Tally) -> None:
    tally.observe(told(50, files={0: 50}))
    after = restarted(tally, record(0, 60), running=told(70, files={0: 60, 1: 10}))
    assert total(after) == (70, 0)
    assert after.of(CAPTURE).interruptions == 0
    after.end(told(70, files={0: 60, 1: 10}))
    after.settle(CAPTURE, record(1, 10))
    assert total(after) == (70, 0)


def test_when_agent_and_worker_were_killed_the_files_complete_what_was_kept(tally: Tally) -> None:
    tally.observe(told(50, files={0: 10}, dropped=2))
    after = restarted(tally, record(0, 15), record(1, 20, run=1))
    assert total(after) == (75, 2)
    assert after.of(CAPTURE).interruptions == 1
    again = restarted(after, record(0, 15), record(1, 20))
    assert total(again) == (75, 2), "nor does another restart count anything twice"
    assert again.of(CAPTURE).interruptions == 1


def test_a_file_recovered_by_another_agent_counts_for_the_run_that_told_of_it(tally: Tally) -> None:
    tally.observe(told(50, files={0: 50}))
    after = restarted(tally)
    after.settle(CAPTURE, record(0, 60, run=0))
    assert total(after) == (60, 0)
    assert total(restarted(after, record(0, 60, run=0))) == (60, 0)


def test_files_of_a_run_that_nobody_knew_count_as_they_are(tally: Tally) -> None:
    after = restarted(tally, record(0, 15, run=7), record(1, 20, run=8))
    assert total(after) == (35, 0)
    assert after.of(CAPTURE).interruptions == 0


def test_an_agent_that_was_restarted_in_good_order_interrupted_nothing(tally: Tally) -> None:
    tally.observe(told(50, files={0: 50}))
    tally.observe(told(55, files={0: 55}, state=State.STOPPED))  # nobody was there any more to answer a stop
    after = restarted(tally, record(0, 55))
    after.observe(told(5, run=2, files={1: 5}))
    assert total(after) == (60, 0)
    assert after.of(CAPTURE).interruptions == 0


def test_runs_without_files_are_folded_into_one_and_still_count(tally: Tally) -> None:
    for run in range(100):
        tally.observe(told(3, run=run, files={run: 3}))
        tally.end(told(3, run=run, files={run: 3}))
    tally.observe(told(2, run=100, files={}))
    before = tally.ended()
    tally.observe(told(1, run=101, files={101: 1}))
    tally.end(told(1, run=101, files={101: 1}))  # after the files were listed
    tally.fold(before, {CAPTURE: {name(98), name(99)}})
    assert len(tally.of(CAPTURE).runs) == 4
    assert total(tally) == (303, 0)
    after = restarted(tally, record(98, 3, run=98), record(99, 3, run=99))
    assert total(after) == (303, 0)


def test_a_run_that_the_capturer_still_tells_of_is_not_folded(tally: Tally) -> None:
    stopped = told(3, files={0: 3}, state=State.STOPPED)
    tally.observe(stopped)
    tally.fold(tally.ended(), {})
    tally.observe(stopped)
    assert total(tally) == (3, 0)


def test_evictions_are_kept(tally: Tally) -> None:
    tally.evict(CAPTURE)
    tally.evict(CAPTURE)
    assert restarted(tally).of(CAPTURE).evicted == 2


def test_mere_counters_are_not_urgent_and_nothing_is_kept_twice(tally: Tally) -> None:
    tally.observe(told(5, files={0: 5}))
    assert tally.unsaved(urgent=True).keys() == {CAPTURE}, "a run that begins must be known as one that may be lost"
    tally.observe(told(6, files={0: 6}))
    assert tally.unsaved(urgent=True) == {}
    assert tally.unsaved(urgent=False).keys() == {CAPTURE}
    assert tally.unsaved(urgent=False) == {}
    tally.end(told(6, files={0: 6}))
    assert tally.unsaved(urgent=True).keys() == {CAPTURE}


def test_what_could_not_be_written_is_given_again(tally: Tally) -> None:
    tally.observe(told(5, files={0: 5}))
    kept = tally.unsaved(urgent=False)
    tally.not_kept([CAPTURE, str(uuid.uuid4())])
    assert tally.unsaved(urgent=True) == kept
    assert tally.unsaved(urgent=False) == {}


def test_a_capture_that_is_gone_is_forgotten(tally: Tally) -> None:
    tally.observe(told(5, files={0: 5}))
    tally.forget(CAPTURE)
    assert total(tally) == (0, 0)
    assert tally.unsaved(urgent=False) == {}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"runs": 1}', b"\xff"])
def test_counters_that_can_not_be_read_are_refused(content: bytes) -> None:
    with pytest.raises(CountersError):
        parse(content)
