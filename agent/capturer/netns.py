"""From a pod to its network namespace, without asking the container runtime.

A pod's processes are known by their cgroup, whose path kubelet spells with the pod's UID. Nested cgroups can spell
any UID, since a container may make its own: so only the outermost component that spells one counts, and only below
kubelet's `kubepods`. The namespace found must not be the node's and must hold an address of the pod.
"""

import contextlib
import ctypes
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, Self, TypeVar

Address = IPv4Address | IPv6Address
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


def open_pod(uid: str, addresses: Collection[Address], *, host: Path) -> Namespace:
    """Open the network namespace of the pod with this UID and one of these addresses.

    `host` is the node's network namespace, which is never opened. Raises NamespaceError, OSError.
    """
    node = host.stat()
    forbidden = (node.st_dev, node.st_ino)
    seen: set[tuple[int, int]] = set()
    on_host = False
    for descriptor in _namespaces(uid):
        try:
            status = os.fstat(descriptor)
            identity = (status.st_dev, status.st_ino)
            if identity == forbidden:
                on_host = True
            elif identity not in seen:
                seen.add(identity)
                if Namespace(descriptor).run(local_addresses) & set(addresses):
                    return Namespace(os.dup(descriptor))
        finally:
            os.close(descriptor)
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


def interfaces() -> dict[str, bool]:
    """The interfaces of this thread's network namespace that are up, each with whether it is a loopback."""
    up, loopback = 0x1, 0x8  # IFF_UP, IFF_LOOPBACK
    found = {}
    for body in _netlink(_RTM_GETLINK, struct.pack("BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)):
        index, flags = struct.unpack_from("iI", body, 4)
        if flags & up:
            with contextlib.suppress(OSError):  # it went between the two calls
                found[socket.if_indextoname(index)] = bool(flags & loopback)
    return found


def local_addresses() -> set[Address]:
    """The addresses of this thread's network namespace (RTM_GETADDR, rtnetlink(7))."""
    found = set()
    for body in _netlink(_RTM_GETADDR, struct.pack("BBBBi", socket.AF_UNSPEC, 0, 0, 0, 0)):
        attributes = dict(_attributes(body[8:]))
        # On a point-to-point link IFA_ADDRESS is the other end, and IFA_LOCAL ours.
        raw = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        if raw:
            found.add(ip_address(raw))
    return found


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


def _namespaces(uid: str) -> Iterator[int]:
    """Open descriptors of the network namespaces of the pod's processes; the caller closes each."""
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        try:
            # The directory held open keeps meaning this process, also when its number is given to another one.
            directory = os.open(f"/proc/{process}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # it has ended
        try:
            if _pod_of(directory) == uid:
                yield os.open("ns/net", os.O_RDONLY, dir_fd=directory)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        finally:
            os.close(directory)


def _pod_of(directory: int) -> str | None:
    descriptor = os.open("cgroup", os.O_RDONLY, dir_fd=directory)
    with open(descriptor, encoding="utf-8", errors="surrogateescape") as file:
        return pod_uid(file.read())


_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x1
_NLM_F_DUMP: Final = 0x300
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_HEADER: Final = struct.Struct("IHHII")


def _netlink(kind: int, body: bytes) -> Iterator[bytes]:
    """The bodies of all messages that answer a dump request (netlink(7)). Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as channel:
        channel.send(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
        while True:
            data = channel.recv(1 << 20)
            while data:
                length, received, _, _, _ = _HEADER.unpack_from(data)
                content = data[_HEADER.size : length]
                if received == _NLMSG_DONE:
                    return
                if received == _NLMSG_ERROR:
                    number = -struct.unpack_from("i", content)[0]
                    raise OSError(number, f"netlink: {os.strerror(number)}")
                yield content
                data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        yield kind, data[4:length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
