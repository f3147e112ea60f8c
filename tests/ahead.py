"""An event loop whose clock runs ahead to whatever comes next, so that what takes half a minute takes no time."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Skipping(selectors.SelectSelector):
    """Instead of waiting it says that the time has passed."""

    passed = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout else timeout)
        if not ready and timeout:
            self.passed += timeout
        return ready


class Ahead(asyncio.SelectorEventLoop):
    """A loop whose time is that of its selector."""

    def __init__(self) -> None:
        self._skipping = Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.passed


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main`, in which only timers are waited for."""
    with asyncio.Runner(loop_factory=Ahead) as runner:
        return runner.run(main)
