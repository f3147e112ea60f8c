"""One pod that is captured: finds its network namespace, captures its interfaces, and follows what becomes of both.

A thread of its own waits for the pod's links to change and for its processes to end, so that an interface that comes
later is captured too, and that no namespace is kept alive once its pod is gone.
"""

import contextlib
import functools
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from agent.capturer import netns, rtnetlink
from agent.capturer.capture import InterfaceCapture, Series
from agent.capturer.libpcap import FilterError, Handle, PcapError
from agent.capturer.protocol import InterfaceStatus, State, Target, TargetStatus
from agent.capturer.rtnetlink import Link, Links
from agent.capturer.wakeup import WakeUp
from api import names

TIMEOUT_MILLISECONDS: Final = 50
"""How long the kernel may hold a packet back to fill a block: short enough for a live view, long enough to batch."""

_RETRY_SECONDS: Final = 1.0
_COUNT_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.1
"""A pod may change its links without end; nobody else is to pay for it."""
MOST_INTERFACES: Final = 16
"""Of one target in one run, by their names: each has a ring and a thread, and a pod may make as many as it likes."""

log = logging.getLogger(__name__)


class CaptureError(Exception):
    """The target can't be captured (any more); `reason` is one CamelCase word, the message a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class _Interface:
    """A link that is captured, or was, or could not be: then `capture` is None and `refused` says why.

    `link` is its index, 0 once that link has another name.
    """

    link: int
    tried_at: float
    uncounted: int
    """What the link's counters said when the capture began, less what was seen of one of that name before."""
    seen: int = 0
    capture: InterfaceCapture | None = None
    refused: InterfaceStatus | None = None

    @property
    def status(self) -> InterfaceStatus:
        status = self.capture.status if self.capture is not None else self.refused
        if status is None:
            raise RuntimeError("neither captured nor refused")
        # An interface that has gone took the counters of its last moments with it.
        return replace(status, seen=max(self.seen, status.packets + status.dropped))

    @property
    def is_alive(self) -> bool:
        return self.capture is not None and not self.capture.ended

    def count(self, link: Link) -> None:
        if link.index == self.link:
            self.seen = max(self.seen, link.packets - self.uncounted)

    def end(self) -> None:
        """Stop and wait: then its files are closed and its numbers final."""
        if self.capture is not None:
            self.capture.stop()
            self.capture.join()


class TargetCapture:
    """One target. Its methods are the main thread's; all else happens in a thread of its own."""

    def __init__(
        self,
        target: Target,
        *,
        captures: int,
        host_namespace: Path,
        processes: netns.ProcessTable,
        on_change: Callable[[str], None],
        on_answer: Callable[[], None],
    ) -> None:
        """Begin at once. `captures` is a descriptor of the directory that holds a directory per PacketCapture.

        `on_change` is called with the target's id when its status changed in a way that is worth telling, `on_answer`
        when what `refresh` asked for may be done: both in other threads.
        """
        self.target = target
        self._started = time.time_ns()
        self._host_namespace = host_namespace
        self._captures = captures
        self._processes = processes
        self._on_change: Callable[[], None] = functools.partial(on_change, target.id)
        self._on_answer = on_answer
        self._wake = WakeUp()
        self._stopping = False
        self._opened = False
        self._counts_wanted = 0
        self._counted = 0
        self._missing: tuple[str, ...] = ()
        self._excess: tuple[str, ...] = ()
        self._interfaces: dict[str, _Interface] = {}  # replaced as a whole, since other threads read it
        self._outcome: tuple[State, str, str] | None = None
        try:
            threading.Thread(target=self._run, name=f"target {target.pod_name}").start()
        except RuntimeError as error:  # the system gives no more threads
            self._wake.close()
            self._outcome = State.FAILED, "OpenFailed", f"opening the capture: {error}"

    def move_end(self, until: float | None) -> None:
        """Let the capture end at another time, a Unix time in seconds."""
        self.target = replace(self.target, until=until)

    def stop(self) -> None:
        """Ask every interface for its end. Harmless when repeated."""
        if not self._stopping:
            self._stopping = True
            self._wake.set()

    def refresh(self, *, flush: bool) -> Callable[[], bool]:
        """Ask for the interfaces' counters, and for a flush of every interface; the answer tells whether it was done.

        Counters that the kernel does not give in time are left as they were.
        """
        interfaces = self._interfaces.values()
        captures = [interface.capture for interface in interfaces if interface.capture is not None]
        flushes = [(capture, capture.flush()) for capture in captures] if flush else []
        self._counts_wanted += 1
        wanted = self._counts_wanted
        patience = time.monotonic() + _COUNT_SECONDS
        self._wake.set()

        def done() -> bool:
            counted = self._counted >= wanted or not self._opened or time.monotonic() >= patience
            flushed = all(capture.ended or capture.flushed >= number for capture, number in flushes)
            return self.ended or (counted and flushed)

        return done

    @property
    def status(self) -> TargetStatus:
        interfaces = tuple(interface.status for interface in self._interfaces.values())
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
        state = self.status.state
        return state is State.CAPTURING or state.ended

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop, be it over or not."""
        return self._stopping

    @property
    def ended(self) -> bool:
        return self._outcome is not None

    def _state(self, interfaces: tuple[InterfaceStatus, ...]) -> tuple[State, str, str]:
        if self._outcome is not None:
            return self._outcome
        states = {interface.state for interface in interfaces}
        if not self._opened or State.STARTING in states:
            return State.STARTING, "", ""
        if self._stopping or State.CAPTURING not in states:
            return State.STOPPING, "", ""
        failed = next((interface for interface in interfaces if interface.state is State.FAILED), None)
        if failed is not None:
            return State.CAPTURING, failed.reason, failed.message
        if excess := self._excess:
            left_out = ", ".join(excess[:3]) + (", …" if len(excess) > 3 else "")
            message = (
                f"at most {MOST_INTERFACES} interfaces of a pod are captured, so not {left_out}: name those to capture"
            )
            return State.CAPTURING, "TooManyInterfaces", message
        if self._missing:
            return State.CAPTURING, "InterfaceNotFound", _not_found(self._missing)
        return State.CAPTURING, "", ""

    def _run(self) -> None:
        outcome = State.STOPPED, "", ""
        try:
            self._capture()
        except (CaptureError, netns.NamespaceError) as error:
            outcome = State.FAILED, error.reason, str(error)
        except (PcapError, OSError) as error:
            outcome = State.FAILED, "OpenFailed", f"opening the capture: {error}"
        except Exception as error:
            log.exception("capture of %s", self.target.id)
            outcome = State.FAILED, "InternalError", f"the capturer failed: {error!r}"
        self._wake.close()
        self._outcome = outcome
        self._on_change()

    def _capture(self) -> None:
        """Until stopped. Raises CaptureError, NamespaceError, OSError."""
        addresses = [ip_address(address) for address in self.target.pod_addresses]
        host, processes = self._host_namespace, self._processes
        with (
            netns.open_pod(self.target.pod_uid, addresses, host=host, table=processes) as namespace,
            namespace.run(Links) as links,
        ):
            try:
                self._follow(namespace, links)
            finally:
                self._end_interfaces(links)
        for interface in self._interfaces.values():
            if interface.status.reason == "WriteFailed":
                raise CaptureError(interface.status.reason, interface.status.message)

    def _follow(self, namespace: netns.PodNamespace, links: Links) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(links, select.POLLIN)
        process = namespace.process
        poll.register(process, select.POLLIN)
        while not self._stopping:
            wanted, opened = self._counts_wanted, self._opened
            before = self._interfaces, self._missing, self._excess
            looked = time.monotonic()
            retry = self._look(namespace, links)
            self._opened = True
            self._counted = wanted
            if opened and before[0] is self._interfaces and before[1:] == (self._missing, self._excess):
                self._on_answer()
            else:
                self._on_change()
            ready = {descriptor for descriptor, _ in poll.poll(None if retry is None else retry * 1000)}
            self._wake.clear()
            self._rest(until=looked + _LOOK_SECONDS)
            if process in ready:
                poll.unregister(process)
                namespace.move_on()
                process = namespace.process
                poll.register(process, select.POLLIN)

    def _rest(self, *, until: float) -> None:
        """Wait until then, but not when somebody waits for us."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._stopping and self._counts_wanted == self._counted and (pause := until - time.monotonic()) > 0:
            if poll.poll(pause * 1000):
                self._wake.clear()

    def _look(self, namespace: netns.Namespace, links: Links) -> float | None:
        """Count what was seen, and capture what is not captured yet. Returns in how many seconds to look again at last.

        Raises CaptureError when nothing can be captured, OSError.
        """
        present = self._count(links)
        self._end_renamed(present)
        for interface in self._interfaces.values():
            # What is wrong with the disk or with us is so for all interfaces; who asked may try again later.
            if interface.status.state is State.FAILED and interface.status.reason not in _OF_ONE_INTERFACE:
                raise CaptureError(interface.status.reason, interface.status.message)
        wanted = self.target.interfaces
        chosen = [link for link in present if link.up and (link.name in wanted if wanted else not link.loopback)]
        self._missing = tuple(sorted(set(wanted) - {link.name for link in chosen}))
        excess = []
        for link in sorted(chosen, key=lambda link: link.index):
            if link.name not in self._interfaces and len(self._interfaces) >= MOST_INTERFACES:
                excess.append(link.label)
            elif self._seconds_to_try(link) == 0:
                self._begin(namespace, link)
        self._excess = tuple(excess)
        if not any(interface.is_alive for interface in self._interfaces.values()):
            raise self._nothing_captured()
        return min((wait for link in chosen if (wait := self._seconds_to_try(link)) is not None), default=None)

    def _end_renamed(self, present: list[Link]) -> None:
        """What a link was captured as ends when it has another name: that is another interface, with other files."""
        present_names = {link.index: link.name for link in present}
        for name, interface in self._interfaces.items():
            if present_names.get(interface.link, name) != name:
                interface.end()
                interface.link = 0

    def _seconds_to_try(self, link: Link) -> float | None:
        """How long to wait until the link is to be captured, None while it is, or is one too many."""
        interface = self._interfaces.get(link.name)
        if interface is None:
            return 0.0 if len(self._interfaces) < MOST_INTERFACES else None
        if interface.link != link.index:
            return 0.0
        return None if interface.is_alive else max(0.0, interface.tried_at + _RETRY_SECONDS - time.monotonic())

    def _nothing_captured(self) -> CaptureError:
        for interface in self._interfaces.values():
            if interface.status.state is State.FAILED:
                return CaptureError(interface.status.reason, interface.status.message)
        return CaptureError("InterfaceNotFound", _not_found(self._missing))

    def _count(self, links: Links) -> list[Link]:
        links.clear()
        present = links.present()
        for interface in self._interfaces.values():
            for link in present:
                interface.count(link)
        return present

    def _begin(self, namespace: netns.Namespace, link: Link) -> None:
        """Capture the link. Whatever goes wrong with it is its own matter, and said in its status."""
        before = self._interfaces.get(link.name)
        if before is not None:
            before.end()  # of a link that is gone, though its thread may not know yet
        seen = before.seen if before is not None else 0
        last = before.status if before is not None else InterfaceStatus(interface=link.label, state=State.STARTING)
        interface = _Interface(link.index, time.monotonic(), link.packets - seen, seen)
        reason, message = "OpenFailed", ""
        try:
            self._check_files_are_its_own(link)
            interface.capture = self._open(namespace, link, before=last)
        except CaptureError as error:
            reason, message = error.reason, str(error)
        except (PcapError, OSError, RuntimeError) as error:
            message = f"opening the capture on {link.label}: {error}"
        except Exception as error:
            log.exception("capture of %s on %s", self.target.id, link.label)
            message = f"opening the capture on {link.label}: {error!r}"
        if interface.capture is None:
            interface.refused = replace(last, state=State.FAILED, reason=reason, message=message)
        self._interfaces = self._interfaces | {link.name: interface}
        if interface.capture is not None:
            interface.capture.start()  # only now, so that it finds itself among the interfaces when it fails

    def _check_files_are_its_own(self, link: Link) -> None:
        """Raise CaptureError if another interface is captured whose name is the same in names of files.

        Each of the two would remove the other's files.
        """
        series = self._series(link.name)
        for name, interface in self._interfaces.items():
            if name != link.name and interface.is_alive and self._series(name) == series:
                message = f"files of {link.label} would have the names of those of {interface.status.interface}"
                raise CaptureError("InterfaceNameTaken", message)

    def _series(self, interface: str) -> Series:
        label = rtnetlink.label(interface)
        pod, uid = self.target.pod_name, self.target.pod_uid
        series, _ = Series.of(names.file_name(pod=pod, interface=label, created_ns=0, pod_uid=uid, sequence=0))
        return series

    def _open(self, namespace: netns.Namespace, link: Link, *, before: InterfaceStatus) -> InterfaceCapture:
        """Raises CaptureError, PcapError, OSError, RuntimeError."""
        with contextlib.ExitStack() as undo:
            handle = namespace.run(functools.partial(self._handle, link))
            undo.callback(handle.close)
            directory = _open_directory(self._captures, self.target.capture_uid)
            undo.callback(os.close, directory)
            capture = InterfaceCapture(
                target=self.target,
                interface=link.label,
                handle=handle,
                directory=directory,
                on_change=self._interface_changed,
                before=before,
            )
            undo.pop_all()
        return capture

    def _handle(self, link: Link) -> Handle:
        """To be called inside the pod's namespace. Raises CaptureError, PcapError."""
        handle = Handle(
            link.name,
            snap_length=self.target.snap_length,
            ring_bytes=self.target.ring_bytes,
            timeout_milliseconds=TIMEOUT_MILLISECONDS,
        )
        with contextlib.ExitStack() as undo:
            undo.callback(handle.close)
            try:
                handle.set_filter(self.target.filter)
            except FilterError as error:
                message = f"the filter does not fit the interface {link.label}: {error}"
                raise CaptureError("FilterInvalid", message) from error
            handle.open_gate(loopback=link.loopback)
            undo.pop_all()
        return handle

    def _interface_changed(self) -> None:
        """Called in the interfaces' threads."""
        self._on_change()
        if any(not interface.is_alive for interface in self._interfaces.values()):
            self._wake.set()

    def _end_interfaces(self, links: Links) -> None:
        captures = [interface.capture for interface in self._interfaces.values() if interface.capture is not None]
        for capture in captures:
            capture.stop()
        for capture in captures:
            capture.join()
        with contextlib.suppress(OSError):  # the numbers of before stay
            self._count(links)


_OF_ONE_INTERFACE: Final = frozenset({"InterfaceFailed", "FilterInvalid", "OpenFailed", "InterfaceNameTaken"})


def _not_found(missing: tuple[str, ...]) -> str:
    return f"the pod has no interface {', '.join(missing) or 'but the loopback'} that is up"


def _open_directory(captures: int, capture_uid: str) -> int:
    """Make the capture's directory if it isn't there and open it, never through a link. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(capture_uid, dir_fd=captures)
    return os.open(capture_uid, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=captures)
