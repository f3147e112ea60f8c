"""Which captures are looked at, and when."""

from controller.agenda import Agenda
from tests.controller.cases import START, after

KNOWN = {"a", "b"}


def test_what_is_touched_is_taken_once() -> None:
    agenda = Agenda()
    agenda.touch(["a"])
    assert agenda.pause(START, longest=30) == 0
    assert agenda.take(KNOWN, START) == {"a"}
    assert agenda.take(KNOWN, START) == set()
    assert agenda.pause(START, longest=30) == 30


def test_the_earliest_moment_counts() -> None:
    agenda = Agenda()
    for seconds in (20, 10, 15):
        agenda.schedule("a", after(seconds=seconds))
    assert agenda.pause(START, longest=30) == 10
    assert agenda.take(KNOWN, after(seconds=9)) == set()
    assert agenda.take(KNOWN, after(seconds=10)) == {"a"}


def test_what_is_touched_does_not_wait_for_its_moment() -> None:
    agenda = Agenda()
    agenda.schedule("a", after(seconds=10))
    agenda.touch(["a"])
    agenda.schedule("a", after(seconds=10))
    assert agenda.take(KNOWN, START) == {"a"}


def test_what_is_gone_is_forgotten() -> None:
    agenda = Agenda()
    agenda.touch(["gone"])
    assert agenda.take(KNOWN, START) == set()
    assert agenda.take({"gone"}, START) == set()


def test_when_the_clock_is_set_back_everything_is_looked_at() -> None:
    agenda = Agenda()
    agenda.take(KNOWN, START)
    agenda.schedule("a", after(seconds=10))
    assert agenda.take(KNOWN, after(hours=-1)) == KNOWN
    assert agenda.take(KNOWN, after(hours=-1)) == set()
