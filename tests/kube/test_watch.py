"""Caches on a made-up stream of answers; on a real kube-apiserver they are tested in tests/cluster/test_client.py."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import pytest

from kube.client import PODS, Client, Json, ObjectList, WatchEvent
from kube.status import StatusError
from kube.watch import Cache, Key, Signal


async def test_a_signal_set_before_it_is_waited_for_is_not_lost() -> None:
    signal = Signal()
    signal.set()
    signal.set()
    assert await signal.wait(0) is True
    assert await signal.wait(0) is False, "setting it twice is the same as once"


async def test_waiting_ends_without_a_signal_after_the_timeout() -> None:
    assert await Signal().wait(0.01) is False


def pod(name: str, version: int) -> Json:
    return {"metadata": {"namespace": "n", "name": name, "resourceVersion": str(version)}}


class Script(Client):
    """Answers watches as it is told, then stays silent; remembers what it was asked."""

    def __init__(self, *watches: Iterable[WatchEvent | StatusError], listed: Iterable[Json] = ()) -> None:
        self.lists = 0
        self.versions: list[str] = []
        self.silent = asyncio.Event()
        self._watches = list(watches)
        self._listed = list(listed)

    async def pages(self, *_: Any, **__: Any) -> AsyncIterator[ObjectList]:
        self.lists += 1
        for item in self._listed:
            yield ObjectList([item], "10")
        yield ObjectList([], "10")

    async def watch(self, *_: Any, resource_version: str, **__: Any) -> AsyncIterator[WatchEvent]:
        self.versions.append(resource_version)
        if not self._watches:
            self.silent.set()
            await asyncio.Event().wait()
        for event in self._watches.pop(0):
            if isinstance(event, StatusError):
                raise event
            yield event


T = TypeVar("T")


async def followed(
    script: Script, parse: Callable[[Json], T], *, on_change: Callable[[Key], None] | None = None
) -> Cache[T]:
    cache = Cache(script, PODS, parse, on_change=on_change)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(cache.run(), name="cache")
        await script.silent.wait()
        task.cancel()
    return cache


def version(item: Json) -> str:
    return str(item["metadata"]["resourceVersion"])


async def test_a_watch_that_broke_is_resumed_where_it_was() -> None:
    script = Script([WatchEvent("ADDED", pod("a", 11)), StatusError(503, "cut")], [StatusError(429, "busy")])
    cache = await followed(script, version)
    assert script.lists == 1
    assert script.versions == ["10", "11", "11"]
    assert cache.get("a", "n") == "11"


async def test_everything_is_listed_again_when_the_version_is_forgotten() -> None:
    script = Script([StatusError(410, "too old")], listed=[pod("a", 9)])
    cache = await followed(script, version)
    assert script.lists == 2
    assert cache.get("a", "n") == "9"


@pytest.mark.parametrize("failure", [ValueError("bad"), OverflowError("date value out of range")])
async def test_an_object_on_which_reading_fails_in_any_way_takes_no_other_with_it(failure: Exception) -> None:
    def parse(item: Json) -> str:
        if item["metadata"]["name"] == "bad":
            raise failure
        return version(item)

    cache = await followed(Script(listed=[pod("bad", 1), pod("good", 2)]), parse)
    assert cache.objects == {Key("n", "good"): "2"}
    assert cache.unparsable == {Key("n", "bad"): str(failure)}


async def test_a_version_that_reads_the_same_is_no_change_and_the_object_stays() -> None:
    changed: list[Key] = []
    first, second = WatchEvent("ADDED", pod("a", 11)), WatchEvent("MODIFIED", pod("a", 12))
    read: list[tuple[str, ...]] = []

    def names(item: Json) -> tuple[str, ...]:
        read.append((item["metadata"]["namespace"], item["metadata"]["name"]))
        return read[-1]

    cache = await followed(Script([first, second]), names, on_change=changed.append)
    assert len(read) == 2
    assert changed == [Key("n", "a")]
    assert cache.get("a", "n") is read[0]


async def test_an_object_that_comes_again_is_a_change_even_when_it_reads_the_same() -> None:
    changed: list[Key] = []
    events = [WatchEvent("ADDED", pod("a", 11)), WatchEvent("DELETED", pod("a", 12)), WatchEvent("ADDED", pod("a", 13))]
    await followed(Script(events), lambda item: str(item["metadata"]["name"]), on_change=changed.append)
    assert len(changed) == 3
