"""One agent at a time keeps a node's files: a second one, as in a rolling update with surge, waits until it is free."""

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

LOCK_NAME: Final = ".agent.lock"
_RETRY_SECONDS: Final = 0.25

log = logging.getLogger(__name__)


class NodeLock:
    """A lock on the directory with the captures' directories (flock(2)), let go by the kernel when its holder dies."""

    def __init__(self, captures: Path) -> None:
        self._captures = captures
        self.waits_for: str | None = "not asked for yet"

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Wait until it is ours, and hold it while the block runs."""
        descriptor = await self._acquire()
        try:
            yield
        finally:
            os.close(descriptor)

    async def _acquire(self) -> int:
        while True:
            try:
                descriptor = _try(self._captures / LOCK_NAME)
            except BlockingIOError:
                reason = "another agent is at work on this node"
            except OSError as error:  # the capturer makes the directory when it starts
                reason = f"the lock of the node's files can't be taken: {error}"
            else:
                if self.waits_for != "not asked for yet":
                    log.info("the node's files are ours now")
                self.waits_for = None
                return descriptor
            if reason != self.waits_for:
                log.warning("waiting: %s", reason)
                self.waits_for = reason
            await asyncio.sleep(_RETRY_SECONDS)


def _try(path: Path) -> int:
    """Raises OSError, BlockingIOError when another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
