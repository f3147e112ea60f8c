"""What goes when the disk runs full."""

from pathlib import Path

from agent.disk import Decision, Limits, decide, measure
from agent.store import StoredFile
from api.capturenode import Disk

FILES = [
    StoredFile("u", "oldest", 100, finished=True),
    StoredFile("u", "writing", 100, finished=False),
    StoredFile("v", "newer", 100, finished=True),
    StoredFile("u", "newest", 100, finished=True),
]


def decision(*, used_limit: int = 10_000, free_limit: int = 0, free: int = 10_000, paused: bool = False) -> Decision:
    disk = Disk(capacity=20_000, free=free, used=sum(file.size for file in FILES))
    return decide(disk, FILES, Limits(used=used_limit, free=free_limit), paused=paused)


def names(made: Decision) -> list[str]:
    return [file.name for file in made.remove]


def test_nothing_goes_while_there_is_room() -> None:
    assert decision() == Decision((), None)


def test_over_the_nodes_limit_the_oldest_finished_files_go() -> None:
    made = decision(used_limit=250)
    assert names(made) == ["oldest", "newer"]
    assert made.paused is None


def test_below_the_floor_the_oldest_finished_files_go() -> None:
    made = decision(free_limit=1000, free=950)
    assert names(made) == ["oldest"]
    assert made.paused is None


def test_when_that_is_not_enough_captures_pause_and_say_so() -> None:
    made = decision(free_limit=10_000, free=100)
    assert names(made) == ["oldest", "newer", "newest"]
    assert made.paused is not None
    assert made.paused.reason == "DiskPressure"


def test_files_that_are_being_written_count_against_the_nodes_limit() -> None:
    made = decision(used_limit=50)
    assert names(made) == ["oldest", "newer", "newest"]
    assert made.paused is not None
    assert made.paused.reason == "DiskPressure"
    assert decision(used_limit=110, paused=True).paused is not None, "100 are left, and an eighth is not to spare"
    assert decision(used_limit=120, paused=True).paused is None


def test_the_floor_is_a_share_of_the_file_system_too() -> None:
    disk = Disk(capacity=1000, free=140, used=0)
    made = decide(disk, [], Limits(used=100, free=10, free_percent=15), paused=False)
    assert made.paused is not None
    assert decide(disk, [], Limits(used=100, free=10, free_percent=14), paused=False).paused is None


def test_a_pause_ends_only_when_there_is_some_more_room() -> None:
    assert decision(free_limit=8000, free=8500, paused=True).paused is not None
    assert decision(free_limit=8000, free=9000, paused=True).paused is None


def test_the_disk_is_measured(tmp_path: Path) -> None:
    disk = measure(tmp_path, FILES)
    assert disk.used == 400
    assert 0 < disk.free <= disk.capacity
