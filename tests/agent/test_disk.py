"""What goes when the disk runs full."""

from pathlib import Path

import pytest

from agent.disk import Decision, Inodes, Limits, Owner, decide, free_bytes, measure
from agent.reconcile import Pauses, Verdict
from agent.store import StoredFile
from api.capturenode import Disk


def stored(capture: str, name: str, *, finished: bool) -> StoredFile:
    return StoredFile(capture, name, 60, finished=finished, space=100)


FILES = [
    stored("u", "oldest", finished=True),
    stored("u", "writing", finished=False),
    stored("v", "newer", finished=True),
    stored("u", "newest", finished=True),
]
FULL = Verdict("Error", "DiskPressure", "as it was")
PAUSED = Pauses(node=FULL)


def decision(
    *,
    used_limit: int = 10_000,
    free_limit: int = 0,
    free: int = 10_000,
    namespace_limit: int = 10_000,
    capture_limits: dict[str, int] | None = None,
    paused: Pauses | None = None,
    files: list[StoredFile] = FILES,
) -> Decision:
    disk = Disk(capacity=20_000, free=free, used=sum(file.size for file in files))
    limits = capture_limits or {}
    owners = {"u": Owner("dev", limits.get("u")), "v": Owner("prod", limits.get("v"))}
    return decide(
        disk,
        files,
        Limits(used=used_limit, free=free_limit, namespace=namespace_limit),
        owners=owners,
        paused=paused or Pauses(),
    )


def names(made: Decision) -> list[str]:
    return [file.name for file in made.remove]


def test_nothing_goes_while_there_is_room() -> None:
    made = decision()
    assert (made.remove, made.paused) == ((), Pauses())


def test_over_the_nodes_limit_the_oldest_finished_files_go() -> None:
    made = decision(used_limit=250)
    assert names(made) == ["oldest", "newer"]
    assert made.paused == Pauses()


def test_below_the_floor_the_oldest_finished_files_go() -> None:
    made = decision(free_limit=1000, free=950)
    assert names(made) == ["oldest"]
    assert made.paused == Pauses()


def test_when_that_is_not_enough_captures_pause_and_say_so() -> None:
    made = decision(free_limit=10_000, free=100)
    assert names(made) == ["oldest", "newer", "newest"]
    assert made.paused.node is not None
    assert made.paused.node.reason == "DiskPressure"


def test_files_that_are_being_written_count_against_the_nodes_limit() -> None:
    made = decision(used_limit=50)
    assert names(made) == ["oldest", "newer", "newest"]
    assert made.paused.node is not None
    assert "MAX_USED_BYTES" in made.paused.node.message


def test_over_a_captures_limit_its_own_oldest_files_go_and_it_alone_pauses() -> None:
    assert names(decision(capture_limits={"u": 250})) == ["oldest"]
    made = decision(capture_limits={"u": 99, "v": 100})
    assert names(made) == ["oldest", "newest"]
    assert made.paused.captures.keys() == {"u"}
    assert "maxBytesPerNode" in made.paused.captures["u"].message
    assert (made.paused.node, made.paused.namespaces) == (None, {})


def test_over_a_namespaces_limit_its_own_oldest_files_go_and_its_captures_alone_pause() -> None:
    assert names(decision(namespace_limit=250)) == ["oldest"]
    made = decision(namespace_limit=99)
    assert names(made) == ["oldest", "newest", "newer"]
    assert made.paused.namespaces.keys() == {"dev"}
    assert "MAX_NAMESPACE_BYTES" in made.paused.namespaces["dev"].message
    assert (made.paused.node, made.paused.captures) == (None, {})


def test_files_that_a_narrower_scope_gave_up_need_not_go_twice() -> None:
    made = decision(capture_limits={"u": 250}, namespace_limit=250, used_limit=300)
    assert names(made) == ["oldest"]


def test_files_of_no_known_capture_count_for_the_node_alone() -> None:
    files = [stored("w", "stray", finished=True), *FILES]
    assert names(decision(files=files, namespace_limit=300)) == []
    assert names(decision(files=files, used_limit=450)) == ["stray"]


def test_the_floor_is_a_share_of_the_file_system_too() -> None:
    disk = Disk(capacity=1000, free=140, used=0)

    def paused(percent: int) -> Verdict | None:
        limits = Limits(used=100, free=10, free_percent=percent)
        return decide(disk, [], limits, owners={}, paused=Pauses()).paused.node

    assert paused(15) is not None
    assert paused(14) is None


@pytest.mark.parametrize(
    ("free", "paused", "gone", "pauses"),
    [
        (50, False, [], False),
        (49, False, ["oldest"], False),
        (45, False, ["oldest", "newer", "newest"], False),
        (43, False, ["oldest", "newer", "newest"], True),
        (56, True, [], False),
        (54, True, ["oldest"], False),
    ],
)
def test_a_share_of_the_inodes_stays_free(free: int, paused: bool, gone: list[str], pauses: bool) -> None:
    """A file and its record are two of them; a pause needs an eighth to spare."""
    disk = Disk(capacity=20_000, free=10_000, used=400)
    made = decide(
        disk,
        FILES,
        Limits(used=10_000, free=0),
        owners={},
        paused=PAUSED if paused else Pauses(),
        inodes=Inodes(capacity=1000, free=free),
    )
    assert names(made) == gone
    assert (made.paused.node is not None) is pauses


def test_a_pause_ends_only_when_there_is_an_eighth_to_spare() -> None:
    assert decision(used_limit=110, paused=PAUSED).paused.node == FULL, "100 are left, and an eighth is not to spare"
    assert decision(used_limit=120, paused=PAUSED).paused.node is None
    assert decision(free_limit=8000, free=8500, paused=PAUSED).paused.node == FULL
    assert decision(free_limit=8000, free=9000, paused=PAUSED).paused.node is None
    capture = Pauses(captures={"u": FULL})
    assert decision(capture_limits={"u": 110}, paused=capture).paused == capture
    assert decision(capture_limits={"u": 120}, paused=capture).paused == Pauses()


def test_older_files_make_the_room_that_ends_a_pause() -> None:
    finished = [stored("u", str(number), finished=True) for number in range(10)]
    made = decision(files=finished, capture_limits={"u": 1000}, paused=Pauses(captures={"u": FULL}))
    assert names(made) == ["0", "1"]
    assert made.paused == Pauses()


@pytest.mark.parametrize(
    ("changes", "allowance"),
    [
        ({}, 4800),
        ({"free": 1000, "free_limit": 500}, 250),
        ({"capture_limits": {"u": 400}}, 50),
        ({"namespace_limit": 320}, 10),
        ({"namespace_limit": 300}, 1),
    ],
)
def test_half_of_what_is_left_of_the_tightest_limit_may_be_written_unseen(
    changes: dict[str, int], allowance: int
) -> None:
    assert decision(**changes).allowance == allowance  # type: ignore[arg-type]


def test_the_disk_is_measured(tmp_path: Path) -> None:
    disk = measure(tmp_path, FILES)
    assert disk.used == 400
    assert 0 < disk.free <= disk.capacity
    assert 0 < free_bytes(tmp_path) <= disk.capacity
