"""Answers of kube-apiserver, kept for a while and asked for once.

Who a user is and what they may do is asked with every request; a burst of equal requests must become one question, and
memory must not grow with the number of users.
"""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Flight(Generic[V]):
    """One question under way. Whoever holds the lock asks; the others find the outcome when they get it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    outcome: Callable[[], V] | None = None
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Kept(Generic[V]):
    value: V
    until: float
    weight: int


class Answers(Generic[K, V]):
    """A cache with a bounded number of entries, the least recently used going first.

    `lifetime` tells for how many seconds an answer is kept, counted from when it was asked for, so that none is older
    than that when it is given; one of no seconds is not kept. With `weigh`, all that is kept weighs `capacity` at most.
    Failures go to everyone who waits for them and are not kept. When the one who asks is cancelled, another who waits
    asks in its place.
    """

    def __init__(
        self,
        *,
        lifetime: Callable[[V], float],
        size: int,
        weigh: Callable[[V], int] = lambda _: 0,
        capacity: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifetime = lifetime
        self._size = size
        self._weigh = weigh
        self._capacity = capacity
        self._clock = clock
        self._weight = 0
        self._kept: OrderedDict[K, _Kept[V]] = OrderedDict()
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self, key: K) -> V | None:
        """The answer, if one is kept."""
        kept = self._fresh(key)
        return None if kept is None else kept.value

    async def get(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The kept answer, or what `ask` gives. Raises what `ask` raises."""
        if (kept := self._fresh(key)) is not None:
            return kept.value
        flight = self._flights.setdefault(key, _Flight())
        flight.waiting += 1
        try:
            async with flight.lock:
                if flight.outcome is None:
                    flight.outcome = await self._asked(key, ask)
                    self._forget(key, flight)
                return flight.outcome()
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                self._forget(key, flight)

    def _fresh(self, key: K) -> _Kept[V] | None:
        if (kept := self._kept.get(key)) is None:
            return None
        if self._clock() < kept.until:
            self._kept.move_to_end(key)
            return kept
        self._drop(key)
        return None

    async def _asked(self, key: K, ask: Callable[[], Awaitable[V]]) -> Callable[[], V]:
        began = self._clock()
        try:
            value = await ask()
        except Exception as error:
            failure = error

            def fail() -> V:
                raise failure.with_traceback(None)

            return fail
        self._keep(key, _Kept(value, began + self._lifetime(value), self._weigh(value)))
        return lambda: value

    def _keep(self, key: K, answer: _Kept[V]) -> None:
        if answer.until <= self._clock() or answer.weight > self._capacity:
            return
        self._drop(key)
        self._kept[key] = answer
        self._weight += answer.weight
        while len(self._kept) > self._size or self._weight > self._capacity:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: K) -> None:
        if (dropped := self._kept.pop(key, None)) is not None:
            self._weight -= dropped.weight

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def fingerprint(question: dict[str, Any]) -> bytes:
    """A key for a question of JSON that weighs the same for every question: a user can be in thousands of groups."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).digest()
