import asyncio

import pytest

from kube.answers import Answers, fingerprint


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Service:
    """Counts questions, and answers each when told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self) -> int:
        self.asked += 1
        number = self.asked
        await self.may_answer.wait()
        if self.failure:
            raise self.failure
        return number


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_an_answer_is_kept_for_its_lifetime_and_no_longer() -> None:
    clock, service = Clock(), Service()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 10, size=8, clock=clock)
    service.may_answer.set()

    assert await answers.get("k", service) == 1
    clock.now = 9.9
    assert await answers.get("k", service) == 1
    clock.now = 10
    assert await answers.get("k", service) == 2


async def test_equal_questions_at_a_time_are_asked_once() -> None:
    service = Service()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 10, size=8)
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(answers.get("k", service)) for _ in range(20)]
        await _settle()
        service.may_answer.set()

    assert service.asked == 1
    assert {task.result() for task in waiting} == {1}


async def test_a_failure_goes_to_everyone_who_waits_and_is_not_kept() -> None:
    service = Service()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 10, size=8)
    service.failure = LookupError("down")
    waiting = [asyncio.create_task(answers.get("k", service)) for _ in range(5)]
    await _settle()
    service.may_answer.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert [str(result) for result in results] == ["down"] * 5
    assert service.asked == 1
    service.failure = None
    assert await answers.get("k", service) == 2


async def test_when_the_one_who_asks_is_cancelled_the_next_asks() -> None:
    service = Service()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 10, size=8)
    first = asyncio.create_task(answers.get("k", service))
    await _settle()
    second = asyncio.create_task(answers.get("k", service))
    await _settle()
    first.cancel()
    await _settle()
    service.may_answer.set()

    assert await second == 2
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_the_least_recently_used_answer_goes_first() -> None:
    service = Service()
    service.may_answer.set()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 10, size=2)
    for key in ("a", "b", "a", "c"):
        await answers.get(key, service)

    assert len(answers) == 2
    assert await answers.get("a", service) == 1
    assert await answers.get("b", service) == 4


async def test_the_lifetime_may_depend_on_the_answer() -> None:
    clock, service = Clock(), Service()
    answers: Answers[str, int] = Answers(lifetime=lambda answer: 1 if answer == 1 else 10, size=8, clock=clock)
    service.may_answer.set()

    assert await answers.get("k", service) == 1
    clock.now = 2
    assert await answers.get("k", service) == 2
    clock.now = 11
    assert await answers.get("k", service) == 2


async def test_an_answer_that_took_long_is_kept_the_shorter() -> None:
    """Its age counts from the question, since it may have been true for no longer than that."""
    clock, service = Clock(), Service()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 10, size=8, clock=clock)
    asking = asyncio.create_task(answers.get("k", service))
    await _settle()
    clock.now = 6
    service.may_answer.set()

    assert await asking == 1
    clock.now = 9.9
    assert await answers.get("k", service) == 1
    clock.now = 10
    assert await answers.get("k", service) == 2


async def test_an_answer_of_no_lifetime_is_not_kept() -> None:
    service = Service()
    service.may_answer.set()
    answers: Answers[str, int] = Answers(lifetime=lambda _: 0, size=8)

    assert [await answers.get("k", service) for _ in range(3)] == [1, 2, 3]
    assert len(answers) == 0


async def test_what_is_kept_weighs_no_more_than_it_may() -> None:
    answers: Answers[int, str] = Answers(lifetime=lambda _: 10, size=100, weigh=len, capacity=10)

    async def say(text: str) -> str:
        return text

    for key in range(20):
        await answers.get(key, lambda: say("xxx"))
    assert len(answers) == 3
    await answers.get(21, lambda: say("x" * 11))
    assert len(answers) == 3, "what is too heavy drives nothing out"
    await answers.get(22, lambda: say("x" * 10))
    assert len(answers) == 1


async def test_an_answer_that_ran_out_weighs_nothing() -> None:
    clock = Clock()
    answers: Answers[str, str] = Answers(lifetime=lambda _: 10, size=100, weigh=len, capacity=10, clock=clock)

    async def say(text: str) -> str:
        return text

    for clock.now in range(0, 100, 10):
        await answers.get("k", lambda: say("x" * 6))
    await answers.get("l", lambda: say("x" * 4))
    assert len(answers) == 2


def test_a_fingerprint_tells_questions_apart_and_not_the_order_of_their_fields() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": ["1", "2"]}) != fingerprint({"a": ["2", "1"]})
    assert len(fingerprint({"groups": ["g"] * 10_000})) == 32
