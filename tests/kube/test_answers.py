import asyncio

import pytest

from kube.answers import Answers


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
