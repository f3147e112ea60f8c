"""How one thread wakes another that waits in poll(2)."""

import contextlib
import os
import threading


class WakeUp:
    """Readable from `set` until `clear`; harmless to set when closed."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._open = True

    def fileno(self) -> int:
        return self._descriptor

    def set(self) -> None:
        with self._lock:
            if self._open:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self._descriptor)
