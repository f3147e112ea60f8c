"""Answers of kube-apiserver, kept for a while and asked for once.

Who a user is and what they may do is asked with every request; a burst of equal requests must become one question, and
memory must not grow with the number of users.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Flight(Generic[V]):
    """One question under way. Whoever holds the lock asks; the others find the outcome when they get it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    outcome: Callable[[], V] | None = None
    waiting: int = 0


class Answers(Generic[K, V]):
    """A cache with a bounded number of entries, the least recently used going first.

    `lifetime` tells for how many seconds an answer is kept. Failures go to everyone who waits for them and are not
    kept. When the one who asks is cancelled, another who waits asks in its place.
    """

    def __init__(
        self, *, lifetime: Callable[[V], float], size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime = lifetime
        self._size = size
        self._clock = clock
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The kept answer, or what `ask` gives. Raises what `ask` raises."""
        if (kept := self._kept.get(key)) is not None:
            until, value = kept
            if self._clock() < until:
                self._kept.move_to_end(key)
                return value
            del self._kept[key]
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

    async def _asked(self, key: K, ask: Callable[[], Awaitable[V]]) -> Callable[[], V]:
        try:
            value = await ask()
        except Exception as error:
            failure = error

            def fail() -> V:
                raise failure.with_traceback(None)

            return fail
        self._kept[key] = (self._clock() + self._lifetime(value), value)
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return lambda: value

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
