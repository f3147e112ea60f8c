"""The process that captures: takes the agent's requests on a Unix socket and owns every capture's threads.

The main thread alone reads and writes the socket and never waits for a capture; the captures' threads only tell it that
something changed. So a slow agent stalls no capture, and a slow capture no other request.
"""

import argparse
import contextlib
import ctypes
import errno
import logging
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final

from agent.capturer.netns import ProcessTable
from agent.capturer.protocol import (
    LINE_LIMIT,
    Changed,
    FileStatus,
    Message,
    ProtocolError,
    Reply,
    Report,
    Start,
    State,
    Stop,
    TargetStatus,
    decode,
    encode,
)
from agent.capturer.target import TargetCapture
from agent.capturer.wakeup import WakeUp

_PR_SET_PDEATHSIG: Final = 1
_GOODBYE_SECONDS: Final = 1.0
_NO_DESCRIPTOR_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 1.0
_SWITCH_SECONDS: Final = 0.0005
_STACK_BYTES: Final = 512 << 10

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Connection:
    """An agent on the other end of a socket that is never waited for."""

    channel: socket.socket
    received: bytearray = field(default_factory=bytearray)
    to_send: bytearray = field(default_factory=bytearray)

    def lines(self) -> Iterator[bytes]:
        """The whole lines that have arrived. Raises ConnectionError at the end of the stream or on abuse."""
        data = self.channel.recv(1 << 16)
        if not data:
            raise ConnectionError("closed by the agent")
        self.received += data
        *lines, self.received = self.received.split(b"\n")
        if len(self.received) > LINE_LIMIT:
            raise ConnectionError("a message is too long")
        return (bytes(line) for line in lines)

    def send(self, message: Message) -> None:
        """Send what the socket takes and keep the rest. Raises ConnectionError when the agent reads nothing."""
        self.to_send += encode(message)
        if len(self.to_send) > 4 * LINE_LIMIT:
            raise ConnectionError("the agent does not read")
        self.send_more()

    def send_more(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.to_send:
                del self.to_send[: self.channel.send(self.to_send)]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request whose answer has to wait for a capture's thread."""

    connection: _Connection
    done: Callable[[], bool]
    answer: Callable[[], Iterable[Reply]]


class Worker:
    """Serves agents on a listening Unix socket until told to terminate."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        captures: int,
        host_namespace: Path,
        allowed_uids: frozenset[int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`captures` is a descriptor of the directory for files; only processes of `allowed_uids` may connect.

        `clock` gives the Unix time by which targets end.
        """
        self._clock = clock
        self._began = time.time_ns()
        self._processes = ProcessTable()
        self._host_namespace = host_namespace
        self._listener = listener
        self._captures = captures
        self._allowed_uids = allowed_uids
        self._targets: dict[str, TargetCapture] = {}
        self._announced: dict[str, dict[str, FileStatus]] = {}
        self._waiting: list[_Waiting] = []
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._wake = WakeUp()
        self._signals, self._signalled = socket.socketpair()
        self._signals.setblocking(False)
        self._signalled.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._terminating = False

    def run(self) -> None:
        """Serve until SIGTERM; then stop every target and close all files. To be called in the main thread."""

        def terminate(_number: int, _frame: FrameType | None) -> None:
            self._terminating = True

        signal.signal(signal.SIGTERM, terminate)
        # A handler of Python's does not run while a system call waits that began just after the signal; this wakes it.
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        self.open()
        while not (self._terminating and all(target.ended for target in self._targets.values())):
            self.turn()
        self._say_goodbye()
        self.close()

    def open(self) -> None:
        """Begin to listen."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._selector.register(self._signals, selectors.EVENT_READ, None)

    def close(self) -> None:
        """Leave the agents."""
        self._selector.close()
        self._wake.close()
        for channel in (self._signals, self._signalled, *(connection.channel for connection in self._connections)):
            channel.close()

    @property
    def states(self) -> Mapping[str, State]:
        return {target_id: target.status.state for target_id, target in self._targets.items()}

    def turn(self) -> None:
        """Wait until there is something to do, and do it."""
        for key, events in self._selector.select(self._seconds_to_wait()):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, _Connection):
                self._serve(key.data, events)
            elif key.fileobj is self._signals:
                self._signals.recv(1 << 16)
            else:
                self._wake.clear()
        self._stop_due()
        self._announce()
        self._answer_waiting()

    def _say_goodbye(self) -> None:
        """Tell each agent how its targets ended, for as long as it listens."""
        self._changed.update(self._targets)
        self._announce()
        for connection in self._connections:
            connection.channel.settimeout(_GOODBYE_SECONDS)
            with contextlib.suppress(OSError):
                connection.channel.sendall(connection.to_send)

    def _changed_in_thread(self, target_id: str) -> None:
        with self._lock:
            self._changed.add(target_id)
        self._wake.set()

    def _seconds_to_wait(self) -> float | None:
        """Until the next end of a target, but a second at most: the clock may be set meanwhile."""
        ends = [target.target.until for target in self._targets.values() if not (target.stopping or target.ended)]
        return longest_wait([end for end in ends if end is not None], now=self._clock(), waiting=bool(self._waiting))

    def _stop_due(self) -> None:
        now = self._clock()
        for target in self._targets.values():
            if self._terminating or (target.target.until is not None and target.target.until <= now):
                target.stop()

    def _announce(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, set()
        for target_id in changed & self._targets.keys():
            status = self._targets[target_id].status
            announced = self._announced.get(target_id, {})
            self._announced[target_id] = {
                file.name: file for interface in status.interfaces for file in interface.files
            }
            message = Changed(target=_without(status, announced))
            for connection in list(self._connections):
                self._send(connection, message)

    def _answer_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            if request.connection not in self._connections:
                continue
            if request.done():
                for reply in request.answer():
                    self._send(request.connection, reply)
            else:
                self._waiting.append(request)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            try:
                channel, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                log.error("no connection can be taken: %s", error)  # noqa: TRY400 - often, and nothing to trace
                time.sleep(_NO_DESCRIPTOR_SECONDS)
                return
            uid = _peer_uid(channel)
            if uid not in self._allowed_uids:
                log.error("refused a connection from uid %d", uid)
                channel.close()
                return
            channel.setblocking(False)
            connection = _Connection(channel)
            self._connections.add(connection)
            self._selector.register(channel, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                connection.send_more()
            if events & selectors.EVENT_READ:
                for line in connection.lines():
                    self._handle(connection, line)
            self._watch_writable(connection)
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(connection, error)

    def _send(self, connection: _Connection, message: Message) -> None:
        try:
            connection.send(message)
            self._watch_writable(connection)
        except OSError as error:
            self._drop(connection, error)

    def _watch_writable(self, connection: _Connection) -> None:
        if connection in self._connections:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.to_send else 0)
            self._selector.modify(connection.channel, events, connection)

    def _drop(self, connection: _Connection, error: OSError) -> None:
        if connection in self._connections:
            log.info("connection of an agent ended: %s", error)
            self._connections.remove(connection)
            self._selector.unregister(connection.channel)
            connection.channel.close()

    def _handle(self, connection: _Connection, line: bytes) -> None:
        try:
            message = decode(line)
        except ProtocolError as error:
            log.warning("message refused: %s", error)
            raise ConnectionError(f"message refused: {error}") from error
        match message:
            case Start():
                self._start(connection, message)
            case Stop():
                self._stop(connection, message)
            case Report():
                self._report(connection, message)
            case _:
                raise ConnectionError(f"{type(message).__name__} is not a request")

    def _start(self, connection: _Connection, message: Start) -> None:
        target = self._targets.get(message.target.id)
        if target is not None:
            if target.ended or replace(message.target, until=target.target.until) != target.target:
                self._answer(connection, message.request, error="it has ended or differs: stop it first")
                return
            target.move_end(message.target.until)
        else:
            target = TargetCapture(
                message.target,
                captures=self._captures,
                host_namespace=self._host_namespace,
                processes=self._processes,
                on_change=self._changed_in_thread,
                on_answer=self._wake.set,
            )
            self._targets[message.target.id] = target
            log.info("start %s (%s)", message.target.id, message.target.pod_name)
        self._wait(connection, lambda: target.settled, lambda: [self._reply(message.request, [target])])

    def _stop(self, connection: _Connection, message: Stop) -> None:
        target = self._targets.get(message.id)
        if target is None:
            self._answer(connection, message.request)
            return
        target.stop()
        log.info("stop %s (%s)", message.id, target.target.pod_name)

        def forget() -> list[Reply]:
            if self._targets.get(message.id) is target:
                del self._targets[message.id]
                self._announced.pop(message.id, None)
            return [self._reply(message.request, [target])]

        self._wait(connection, lambda: target.ended, forget)

    def _report(self, connection: _Connection, message: Report) -> None:
        ids = self._targets.keys() if message.ids is None else message.ids
        targets = [self._targets[target_id] for target_id in ids if target_id in self._targets]
        refreshed = [target.refresh(flush=message.flush) for target in targets]

        def answers() -> Iterator[Reply]:
            # One by one, since all files of all targets are too much for a message.
            for target in targets:
                yield replace(self._reply(message.request, [target]), more=True)
            yield self._reply(message.request, [])

        self._wait(connection, lambda: all(done() for done in refreshed), answers)

    def _wait(self, connection: _Connection, done: Callable[[], bool], answer: Callable[[], Iterable[Reply]]) -> None:
        self._waiting.append(_Waiting(connection, done, answer))

    def _answer(self, connection: _Connection, request: int, *, error: str = "") -> None:
        self._send(connection, Reply(request=request, error=error, worker=self._began))

    def _reply(self, request: int, targets: list[TargetCapture]) -> Reply:
        return Reply(request=request, targets=tuple(target.status for target in targets), worker=self._began)


def longest_wait(ends: Sequence[float], *, now: float, waiting: bool) -> float | None:
    """For how many seconds nothing has to be looked at, None for ever, when targets end at `ends` (Unix times).

    Never more than a second while a target has an end, since the clock may be set meanwhile, or a request is `waiting`,
    since its patience may end.
    """
    if not ends:
        return _LONGEST_WAIT_SECONDS if waiting else None
    return max(0.0, min(_LONGEST_WAIT_SECONDS, min(ends) - now))


def _without(status: TargetStatus, announced: Mapping[str, FileStatus]) -> TargetStatus:
    """The status with those files only that are not as announced."""
    interfaces = (
        replace(interface, files=tuple(file for file in interface.files if announced.get(file.name) != file))
        for interface in status.interfaces
    )
    return replace(status, interfaces=tuple(interfaces))


def _peer_uid(channel: socket.socket) -> int:
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def main() -> None:
    """Run the worker on the descriptors that its supervisor gave it."""
    parser = argparse.ArgumentParser(prog="agent.capturer.worker")
    parser.add_argument("--listener", type=int, required=True, help="descriptor of the listening Unix socket")
    parser.add_argument("--captures", type=int, required=True, help="descriptor of the directory for the files")
    parser.add_argument("--host-namespace", type=Path, required=True, help="the node's network namespace")
    parser.add_argument("--supervisor", type=int, required=True, help="number of the process that starts this one")
    parser.add_argument("--allow-uid", type=int, action="append", default=[], help="who may connect")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.stack_size(_STACK_BYTES)
    sys.setswitchinterval(_SWITCH_SECONDS)  # a capture that has a batch waits no longer for a thread busy with Python
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # never outlive the supervisor
    if os.getppid() != arguments.supervisor:
        sys.exit("the supervisor ended before the worker began")
    worker = Worker(
        socket.socket(fileno=arguments.listener),
        captures=arguments.captures,
        host_namespace=arguments.host_namespace,
        allowed_uids=frozenset(arguments.allow_uid),
    )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each captured interface takes five descriptors
    try:
        worker.run()
    except BaseException:
        # The captures' threads would go on without anyone to stop them; the supervisor starts anew.
        log.exception("the worker failed")
        os._exit(1)
    os._exit(0)  # all files are closed; a thread that hangs nevertheless must not hold up the end


if __name__ == "__main__":
    main()
