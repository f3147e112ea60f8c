"""Requests that come at an even rate, as from many clients, each of which waits for its answer."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self

import aiohttp


@dataclass(frozen=True, slots=True)
class Lapse:
    """A request that was not answered as it should be; `began` is in seconds of the loop's clock."""

    number: int
    began: float
    what: str


@dataclass
class Load:
    """While the block runs, `ask` is called `rate` times a second with the request's number; it says what was wrong.

    With `clients` requests under way further ones wait, so that a machine that is slow has less to do, not ever more.
    After the block every request that was begun has ended: `asked` of them, those of `lapses` not as they should.
    """

    ask: Callable[[int], Awaitable[str]]
    rate: int
    clients: int = 128
    asked: int = 0
    lapses: list[Lapse] = field(default_factory=list)
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.clients)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="load")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            while not self._over.is_set():
                await self._free.acquire()
                tasks.create_task(self._one(self.asked), name=f"request {self.asked}")
                self.asked += 1
                await asyncio.sleep(began + self.asked / self.rate - loop.time())

    async def _one(self, number: int) -> None:
        began = asyncio.get_running_loop().time()
        try:
            wrong = await self.ask(number)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            wrong = repr(error)
        finally:
            self._free.release()
        if wrong:
            self.lapses.append(Lapse(number, began, wrong))
