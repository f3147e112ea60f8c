"""The process that captures: takes the agent's requests on a Unix socket and owns every capture's threads.

The main thread alone reads and writes the socket and never waits for a capture; the captures' threads only tell it that
something changed. So a slow agent stalls no capture, and a slow capture no other request.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import logging
import os
import resource
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Final

from agent.capturer import netns
from agent.capturer.capture import InterfaceCapture
from agent.capturer.libpcap import FilterError, Handle, PcapError
from agent.capturer.protocol import (
    LINE_LIMIT,
    Changed,
    InterfaceStatus,
    Message,
    ProtocolError,
    Reply,
    Report,
    Start,
    State,
    Stop,
    Target,
    TargetStatus,
    decode,
    encode,
)

TIMEOUT_MILLISECONDS: Final = 50
"""How long the kernel may hold a packet back to fill a block: short enough for a live view, long enough to batch."""

_PR_SET_PDEATHSIG: Final = 1
_GOODBYE_SECONDS: Final = 1.0
_NO_DESCRIPTOR_SECONDS: Final = 0.1
_STACK_BYTES: Final = 512 << 10

log = logging.getLogger(__name__)


class TargetCapture:
    """One target: finds the pod's namespace, then captures each of its interfaces."""

    def __init__(
        self, target: Target, *, captures: int, host_namespace: Path, on_change: Callable[[str], None]
    ) -> None:
        """`captures` is a descriptor of the directory that holds a directory per PacketCapture."""
        self.target = target
        self._started = time.time_ns()
        self._host_namespace = host_namespace
        self._captures = captures
        self._on_change: Callable[[], None] = functools.partial(on_change, target.id)
        self._lock = threading.Lock()
        self._stopping = False
        self._failure: tuple[str, str] | None = None
        self._interfaces: tuple[InterfaceCapture, ...] | None = None
        try:
            threading.Thread(target=self._run, name=f"open {target.pod_name}").start()
        except RuntimeError as error:  # the system gives no more threads
            self._failure = "OpenFailed", f"opening the capture: {error}"

    def stop(self) -> None:
        """Ask every interface for its end. Harmless when repeated."""
        with self._lock:
            self._stopping = True
            for interface in self._interfaces or ():
                interface.stop()

    def flush(self) -> Callable[[], bool]:
        """Ask for a flush of every interface; the answer tells whether it was done."""
        wanted = [(interface, interface.flush()) for interface in self._interfaces or ()]
        return lambda: all(interface.ended or interface.flushed >= number for interface, number in wanted)

    @property
    def status(self) -> TargetStatus:
        interfaces = tuple(interface.status for interface in self._interfaces or ())
        state, reason, message = self._state(interfaces)
        return TargetStatus(
            target=self.target,
            started=self._started,
            state=state,
            reason=reason,
            message=message,
            interfaces=interfaces,
        )

    @property
    def settled(self) -> bool:
        """Whether it captures, or never will."""
        return self.status.state is not State.STARTING

    @property
    def ended(self) -> bool:
        return self.status.state.ended

    def _state(self, interfaces: tuple[InterfaceStatus, ...]) -> tuple[State, str, str]:
        if self._failure is not None:
            return State.FAILED, *self._failure
        if self._interfaces is None:
            return State.STARTING, "", ""
        failed = next((interface for interface in interfaces if interface.state is State.FAILED), None)
        reason, message = (failed.reason, failed.message) if failed else ("", "")
        states = {interface.state for interface in interfaces}
        for state in (State.STARTING, State.STOPPING, State.CAPTURING):
            if state in states:
                return state, reason, message
        return State.FAILED if failed else State.STOPPED, reason, message

    def _run(self) -> None:
        try:
            interfaces = self._open()
            with self._lock:
                self._interfaces = interfaces
                for interface in interfaces:
                    if self._stopping:
                        interface.stop()
                    interface.start()
        except netns.NamespaceError as error:
            self._failure = error.reason, str(error)
        except FilterError as error:
            self._failure = "FilterInvalid", f"the filter does not fit the interface: {error}"
        except (PcapError, OSError) as error:
            self._failure = "OpenFailed", f"opening the capture: {error}"
        except Exception as error:
            log.exception("opening %s", self.target.id)
            self._failure = "InternalError", f"the capturer failed: {error!r}"
        self._on_change()

    def _open(self) -> tuple[InterfaceCapture, ...]:
        with contextlib.ExitStack() as undo:
            addresses = [ip_address(address) for address in self.target.pod_addresses]
            with netns.open_pod(self.target.pod_uid, addresses, host=self._host_namespace) as namespace:
                handles = namespace.run(lambda: self._open_handles(undo))
            captures = []
            for interface, handle in handles.items():
                directory = _open_directory(self._captures, self.target.capture_uid)
                undo.callback(os.close, directory)
                captures.append(
                    InterfaceCapture(
                        target=self.target,
                        interface=interface,
                        handle=handle,
                        directory=directory,
                        on_change=self._on_change,
                    )
                )
            undo.pop_all()
            return tuple(captures)

    def _open_handles(self, undo: contextlib.ExitStack) -> dict[str, Handle]:
        """Called inside the pod's namespace."""
        present = netns.interfaces()
        wanted = self.target.interfaces or [name for name, loopback in present.items() if not loopback]
        missing = [name for name in wanted if name not in present]
        if missing or not wanted:
            names = ", ".join(missing) or "but the loopback"
            raise netns.NamespaceError("InterfaceNotFound", f"the pod has no interface {names} that is up")
        handles = {}
        for name in wanted:
            handle = Handle(
                name,
                snap_length=self.target.snap_length,
                ring_bytes=self.target.ring_bytes,
                timeout_milliseconds=TIMEOUT_MILLISECONDS,
            )
            undo.callback(handle.close)
            handle.set_filter(self.target.filter)
            handles[name] = handle
        return handles


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
    answer: Callable[[], Reply]


class Worker:
    """Serves agents on a listening Unix socket until told to terminate."""

    def __init__(
        self, listener: socket.socket, *, captures: int, host_namespace: Path, allowed_uids: frozenset[int]
    ) -> None:
        """`captures` is a descriptor of the directory for files; only processes of `allowed_uids` may connect."""
        self._host_namespace = host_namespace
        self._listener = listener
        self._captures = captures
        self._allowed_uids = allowed_uids
        self._targets: dict[str, TargetCapture] = {}
        self._waiting: list[_Waiting] = []
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._terminating = False

    def run(self) -> None:
        """Serve until SIGTERM; then stop every target and close all files. To be called in the main thread."""

        def terminate(_number: int, _frame: FrameType | None) -> None:
            self._terminating = True

        signal.signal(signal.SIGTERM, terminate)
        # A handler of Python's does not run while a system call waits that began just after the signal; this wakes it.
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        while not (self._terminating and all(target.ended for target in self._targets.values())):
            for key, events in self._selector.select(self._seconds_to_wait()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Connection):
                    self._serve(key.data, events)
                else:
                    self._wake.recv(1 << 16)
            self._stop_due()
            self._announce()
            self._answer_waiting()
        self._say_goodbye()

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
        with contextlib.suppress(BlockingIOError):  # then a wake-up waits already
            self._waker.send(b"\0")

    def _seconds_to_wait(self) -> float | None:
        """Look at the clock every second while a target has an end, since the clock may be set meanwhile."""
        return 1.0 if any(target.target.until is not None for target in self._targets.values()) else None

    def _stop_due(self) -> None:
        now = time.time()
        for target in self._targets.values():
            if self._terminating or (target.target.until is not None and target.target.until <= now):
                target.stop()

    def _announce(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, set()
        for target_id in changed & self._targets.keys():
            message = Changed(target=self._targets[target_id].status)
            for connection in list(self._connections):
                self._send(connection, message)

    def _answer_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            if request.connection not in self._connections:
                continue
            if request.done():
                self._send(request.connection, request.answer())
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
        if target is not None and (target.ended or target.target != message.target):
            self._send(connection, Reply(request=message.request, error="it has ended or differs: stop it first"))
            return
        if target is None:
            target = TargetCapture(
                message.target,
                captures=self._captures,
                host_namespace=self._host_namespace,
                on_change=self._changed_in_thread,
            )
            self._targets[message.target.id] = target
            log.info("start %s (%s)", message.target.id, message.target.pod_name)
        self._wait(connection, lambda: target.settled, lambda: _reply(message.request, [target]))

    def _stop(self, connection: _Connection, message: Stop) -> None:
        target = self._targets.get(message.id)
        if target is None:
            self._send(connection, Reply(request=message.request))
            return
        target.stop()
        log.info("stop %s (%s)", message.id, target.target.pod_name)

        def forget() -> Reply:
            if self._targets.get(message.id) is target:
                del self._targets[message.id]
            return _reply(message.request, [target])

        self._wait(connection, lambda: target.ended, forget)

    def _report(self, connection: _Connection, message: Report) -> None:
        ids = self._targets.keys() if message.ids is None else message.ids
        targets = [self._targets[target_id] for target_id in ids if target_id in self._targets]
        flushes = [target.flush() for target in targets] if message.flush else []
        self._wait(connection, lambda: all(flushed() for flushed in flushes), lambda: _reply(message.request, targets))

    def _wait(self, connection: _Connection, done: Callable[[], bool], answer: Callable[[], Reply]) -> None:
        self._waiting.append(_Waiting(connection, done, answer))


def _reply(request: int, targets: list[TargetCapture]) -> Reply:
    return Reply(request=request, targets=tuple(target.status for target in targets))


def _peer_uid(channel: socket.socket) -> int:
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def _open_directory(captures: int, capture_uid: str) -> int:
    """Make the capture's directory if it isn't there and open it, never through a link. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(capture_uid, dir_fd=captures)
    return os.open(capture_uid, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=captures)


def main() -> None:
    """Run the worker on the descriptors that its supervisor gave it."""
    parser = argparse.ArgumentParser(prog="agent.capturer.worker")
    parser.add_argument("--listener", type=int, required=True, help="descriptor of the listening Unix socket")
    parser.add_argument("--captures", type=int, required=True, help="descriptor of the directory for the files")
    parser.add_argument("--host-namespace", type=Path, required=True, help="the node's network namespace")
    parser.add_argument("--allow-uid", type=int, action="append", default=[], help="who may connect")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.stack_size(_STACK_BYTES)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # never outlive the supervisor
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


if __name__ == "__main__":
    main()
