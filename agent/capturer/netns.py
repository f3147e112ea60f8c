"""From a pod to its network namespace, without asking the container runtime.

A pod's processes are known by their cgroup, whose path kubelet spells with the pod's UID. Nested cgroups can spell
any UID, since a container may make its own: so only the outermost component that spells one counts, and only below
kubelet's `kubepods`. The namespace found must not be the node's and must hold an address of the pod.
"""

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

from agent.capturer.rtnetlink import Address, local_addresses

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_UID: Final = r"(?P<uid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})"
_CGROUPFS: Final = re.compile(rf"pod{_UID}")
_SYSTEMD: Final = re.compile(rf"(?:[\w.-]+-)?kubepods(?:-burstable|-besteffort)?-pod{_UID.replace('-[', '_[')}\.slice")
_KUBEPODS: Final = re.compile(r"(?:[\w.-]+-)?kubepods(?:\.slice)?")
_QUALITY_OF_SERVICE: Final = frozenset({"burstable", "besteffort"})

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """The pod has no network namespace that may be captured; `reason` is one CamelCase word, the message a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Namespace:
    """An open network namespace. It lives on as long as this is open, so close it soon."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` inside the namespace, in a thread of its own that ends with it: nothing to restore.

        Threads and processes that `function` starts would stay inside. Raises what `function` raises, or OSError.
        """
        outcome: list[T] = []
        failure: list[BaseException] = []

        def enter() -> None:
            try:
                _enter(self._descriptor)
                outcome.append(function())
            except BaseException as error:
                failure.append(error)  # raised in the caller's thread

        thread = threading.Thread(target=enter, name="namespace")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]


class PodNamespace(Namespace):
    """A pod's network namespace, and one of the processes that live in it.

    Whoever keeps it open watches `process` (a pidfd, readable once that process has ended) and then calls `move_on`, so
    that the namespace of a pod that is gone is let go.
    """

    def __init__(self, descriptor: int, process: int, *, uid: str, table: "ProcessTable") -> None:
        super().__init__(descriptor)
        self.process = process
        self._uid = uid
        self._table = table

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        os.close(self.process)

    def move_on(self) -> None:
        """Watch another process of the pod in this namespace. Raises NamespaceError (`PodGone`) if there is none."""
        mine = _identity(self._descriptor)
        for descriptor, process in self._table.namespaces(self._uid):
            same = _identity(descriptor) == mine
            os.close(descriptor)
            if same:
                os.close(self.process)
                self.process = process
                return
            os.close(process)
        raise NamespaceError("PodGone", "no process of the pod is left in its network namespace")


class ProcessTable:
    """Finds the processes of pods in /proc: those that look at the same time share one reading of it."""

    def __init__(self) -> None:
        self.scans = 0
        self._turn = threading.Condition()
        self._scanning = False
        self._pods: Mapping[str, Sequence[int]] = {}

    def namespaces(self, uid: str) -> Iterator[tuple[int, int]]:
        """The pod's processes: a descriptor of each one's network namespace, and a pidfd. The caller closes both."""
        for process in self._find(uid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError):  # it has ended
                found = _hold(process, uid)
                if found is not None:
                    yield found

    def _find(self, uid: str) -> Sequence[int]:
        """The numbers of the pod's processes, from a scan that began after the call."""
        with self._turn:
            # One that runs already may have passed over what began meanwhile: the next one counts.
            wanted = self.scans + (2 if self._scanning else 1)
            while self.scans < wanted:
                if self._scanning:
                    self._turn.wait()
                    continue
                self._scanning = True
                self._turn.release()
                pods: Mapping[str, Sequence[int]] = {}
                try:
                    pods = _scan()
                finally:
                    self._turn.acquire()
                    self._scanning = False
                    self._pods = pods
                    self.scans += 1
                    self._turn.notify_all()
            return self._pods.get(uid, ())


def open_pod(uid: str, addresses: Collection[Address], *, host: Path, table: ProcessTable) -> PodNamespace:
    """Open the network namespace of the pod with this UID and one of these addresses.

    `host` is the node's network namespace, which is never opened. Raises NamespaceError, OSError.
    """
    node = host.stat()
    seen: set[tuple[int, int]] = set()
    on_host = False
    for descriptor, process in table.namespaces(uid):
        with contextlib.ExitStack() as undo:
            namespace = undo.enter_context(PodNamespace(descriptor, process, uid=uid, table=table))
            identity = _identity(descriptor)
            if identity == (node.st_dev, node.st_ino):
                on_host = True
            elif identity not in seen:
                seen.add(identity)
                if namespace.run(local_addresses) & set(addresses):
                    undo.pop_all()
                    return namespace
    if seen:
        wanted = " or ".join(str(address) for address in addresses)
        raise NamespaceError("AddressNotFound", f"no network namespace of the pod holds its address {wanted}")
    if on_host:
        raise NamespaceError(
            "HostNetwork", "the pod's processes use the node's network, which holds everyone's traffic: not captured"
        )
    raise NamespaceError(
        "NamespaceNotFound", "no process of the pod was found on the node; sandboxed runtimes hide theirs"
    )


def pod_uid(cgroup: str) -> str | None:
    """The UID of the pod that a process with this /proc/PID/cgroup (cgroups(7)) belongs to, None if it is in no pod.

    With several hierarchies (cgroup v1) all that name a pod must name the same one.
    """
    uids = {uid for line in cgroup.splitlines() if (uid := _pod_uid_in_path(line.split(":", 2)[-1]))}
    return uids.pop() if len(uids) == 1 else None


def _enter(descriptor: int) -> None:
    """Move the calling thread into the network namespace (setns(2)). Raises OSError."""
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"entering the pod's network namespace: {os.strerror(number)}")


def _pod_uid_in_path(path: str) -> str | None:
    components = [component for component in path.split("/") if component]
    for position, component in enumerate(components):
        match = _SYSTEMD.fullmatch(component)
        if match is None:
            match = _CGROUPFS.fullmatch(component)
            if match is not None and not _below_kubepods(components[:position]):
                return None
        if match is not None:
            return match["uid"].replace("_", "-")
    return None


def _below_kubepods(parents: list[str]) -> bool:
    """Whether a pod's cgroup may lie here.

    Seen from a private cgroup namespace a path starts with `..` for each level up to the common ancestor, and
    `kubepods` may be that ancestor or above it: then at most the class of service is left before the pod.
    """
    if any(_KUBEPODS.fullmatch(parent) for parent in parents):
        return True
    below = [parent for parent in parents if parent != ".."]
    return len(below) < len(parents) and len(below) <= 1 and _QUALITY_OF_SERVICE.issuperset(below)


def _scan() -> dict[str, list[int]]:
    """The numbers of the processes of each pod."""
    pods: dict[str, list[int]] = {}
    for process in os.listdir("/proc"):
        if process.isdecimal():
            # Those that have ended meanwhile are in no pod any more.
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{process}/cgroup", encoding="utf-8", errors="replace") as file,
            ):
                uid = pod_uid(file.read())
                if uid is not None:
                    pods.setdefault(uid, []).append(int(process))
    return pods


def _hold(process: int, uid: str) -> tuple[int, int] | None:
    """Descriptors of the process's network namespace and of itself, None if it is not of that pod (any more).

    Its directory, held open, keeps meaning the process also when its number is given to another one; the pidfd means
    the same one, because the process is still there when both are open. Raises OSError.
    """
    with contextlib.ExitStack() as undo:
        directory = os.open(f"/proc/{process}", os.O_RDONLY | os.O_DIRECTORY)
        undo.callback(os.close, directory)
        watched = os.pidfd_open(process)
        with contextlib.ExitStack() as unless_taken:
            unless_taken.callback(os.close, watched)
            if _pod_of(directory) != uid:
                return None
            namespace = os.open("ns/net", os.O_RDONLY, dir_fd=directory)
            unless_taken.pop_all()
            return namespace, watched


def _pod_of(directory: int) -> str | None:
    descriptor = os.open("cgroup", os.O_RDONLY, dir_fd=directory)
    with open(descriptor, encoding="utf-8", errors="surrogateescape") as file:
        return pod_uid(file.read())


def _identity(namespace: int) -> tuple[int, int]:
    status = os.fstat(namespace)
    return status.st_dev, status.st_ino
