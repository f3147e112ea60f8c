"""The first process of the capturer's container: keeps a worker running, and nothing else that could fail.

A worker that died is replaced at once, since kubelet would wait ten seconds and more to restart a container. The
listening socket belongs to this process, so agents that connect meanwhile wait instead of being refused.
"""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_ROOT: Final = Path(__file__).resolve().parents[2]
_SHORTEST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 5.0
_STEADY_SECONDS: Final = 10.0
_UMASK: Final = 0o007
_END: Final = (signal.SIGTERM, signal.SIGINT)
_LOCK_SECONDS: Final = 0.2

log = logging.getLogger(__name__)


class SettingsError(ValueError):
    """An environment variable can't be used; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the capturer meets its agent, where files go, who the agent is, and what must never be captured."""

    socket: Path
    directory: Path
    agent_uid: int
    host_namespace: Path

    @classmethod
    def parse(cls, environment: Mapping[str, str]) -> Self:
        """Raises SettingsError."""
        uid = environment.get("AGENT_UID", "65532")
        if not uid.isdecimal():
            raise SettingsError(f"AGENT_UID must be a number, not {uid!r}")
        return cls(
            socket=Path(environment.get("CAPTURER_SOCKET", "/run/kubepcap/capturer.sock")),
            directory=Path(environment.get("DATA_DIRECTORY", "/var/lib/kubepcap")),
            agent_uid=int(uid),
            host_namespace=Path(environment.get("HOST_NETWORK_NAMESPACE", "/proc/1/ns/net")),
        )


class Supervisor:
    """Starts workers, one after the other, until told to terminate."""

    def __init__(self, listener: socket.socket, *, captures: int, settings: Settings) -> None:
        """`captures` is a descriptor of the directory that holds a directory per PacketCapture."""
        self._listener = listener
        self._captures = captures
        self._settings = settings

    def run(self) -> None:
        """Keep a worker running until SIGTERM or SIGINT, then let it close its files.

        One that dies again and again is restarted after longer and longer pauses. Signals, which the caller has
        blocked, are waited for instead of handled, since a handler of Python's does not run while a system call waits
        that began just after the signal.
        """
        pause = _SHORTEST_PAUSE
        while True:
            started = time.monotonic()
            try:
                worker = self._start()
            except OSError as error:  # the system gives no more processes or no memory
                log.error("the worker can't be started: %s; trying again in %.2f s", error, pause)  # noqa: TRY400 - often
            else:
                status = self._supervise(worker)
                if status is None:
                    return
                if time.monotonic() - started >= _STEADY_SECONDS:
                    pause = _SHORTEST_PAUSE
                log.error("the worker ended with status %d; restarting it in %.2f s", status, pause)
            if signal.sigtimedwait(_END, pause) is not None:
                return
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _supervise(self, worker: subprocess.Popen[bytes]) -> int | None:
        """Wait for the worker's end. Returns its status, None when it was told to end."""
        terminating = False
        while True:
            if signal.sigwait({*_END, signal.SIGCHLD}) != signal.SIGCHLD:
                terminating = True
                worker.terminate()
            elif (status := worker.poll()) is not None:
                return None if terminating else status

    def _start(self) -> subprocess.Popen[bytes]:
        descriptors = (self._listener.fileno(), self._captures)
        command = [sys.executable, "-S", "-E", "-m", "agent.capturer.worker"]
        command += ["--listener", str(descriptors[0]), "--captures", str(descriptors[1])]
        command += ["--allow-uid", str(self._settings.agent_uid)]
        command += ["--supervisor", str(os.getpid())]
        command += ["--host-namespace", str(self._settings.host_namespace)]
        return subprocess.Popen(command, cwd=_ROOT, pass_fds=descriptors, stdin=subprocess.DEVNULL)


def listen(path: Path) -> socket.socket:
    """Listen on a Unix socket that this process's group may use. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o660)
    listener.listen()
    return listener


def open_captures(directory: Path) -> int:
    """Open the directory that holds a directory per PacketCapture, making it when it isn't there. Raises OSError."""
    captures = directory / "captures"
    captures.mkdir(exist_ok=True)
    descriptor = os.open(captures, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.chown(descriptor, -1, os.getgid())
    os.chmod(descriptor, 0o2770)  # noqa: S103 - the agent, which shares the group, lists and removes
    return descriptor


def take(captures: int) -> bool:
    """Wait until no other capturer uses the directory. Returns False when told to end meanwhile.

    The lock goes with the descriptor, so a worker that outlives its supervisor still holds it.
    """
    told = False
    while True:
        try:
            fcntl.flock(captures, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                log.warning("another capturer uses the directory: waiting until it has ended")
                told = True
            if signal.sigtimedwait(_END, _LOCK_SECONDS) is not None:
                return False
        else:
            return True


def main() -> None:
    """Run the capturer."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(_UMASK)
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_END, signal.SIGCHLD})
    try:
        settings = Settings.parse(os.environ)
        captures = open_captures(settings.directory)
        if not take(captures):
            return
        listener = listen(settings.socket)
    except (SettingsError, OSError) as error:
        sys.stderr.write(f"capturer: {error}\n")
        sys.exit(2)
    Supervisor(listener, captures=captures, settings=settings).run()
