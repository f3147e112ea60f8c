"""What the agent and the capturer say to each other over their Unix socket: JSON, one message a line.

Both sides import this module, so it stands on the standard library alone. The agent sends requests, each with a number
that the reply carries; between replies the capturer sends a `Changed` for every target whose state or files changed by
themselves. The agent asks for a state (`Start`, `Stop`), so it may repeat itself after either side was restarted.
"""

import dataclasses
import json
import re
import types
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from agent.capturer.libpcap import FILE_HEADER_BYTES, RECORD_HEADER_BYTES

LINE_LIMIT: Final = 16 << 20
"""Bytes of the longest message: one target with 16 interfaces of a thousand files each takes about a quarter."""

_UID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
_POD_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_INTERFACE: Final = re.compile(r"[^\s/\x00]{1,15}")


class ProtocolError(ValueError):
    """A message is not one of ours; the text says which part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One pod to capture for one PacketCapture, with everything the capturer needs to do it alone.

    `interfaces` empty means every interface but the loopback. `ring_bytes` and the file limits hold for each captured
    interface. `max_file_age_seconds` 0 means no limit. `until` is a Unix time in seconds at which the capture ends even
    when no agent is there to stop it, None for never. `direct` asks for writes past the page cache (O_DIRECT), where
    the file system can.
    """

    capture_uid: str
    pod_uid: str
    pod_name: str
    pod_addresses: tuple[str, ...]
    interfaces: tuple[str, ...] = ()
    filter: str = ""
    snap_length: int = 262144
    ring_bytes: int = 4 << 20
    max_file_bytes: int = 10_000_000
    max_file_age_seconds: int = 0
    max_files: int = 2
    until: float | None = None
    direct: bool = False

    def __post_init__(self) -> None:
        for name, pattern in (("capture_uid", _UID), ("pod_uid", _UID), ("pod_name", _POD_NAME)):
            if not pattern.fullmatch(getattr(self, name)):
                raise ProtocolError(f"{name} {getattr(self, name)!r} is not valid")
        for interface in self.interfaces:
            if not _INTERFACE.fullmatch(interface):
                raise ProtocolError(f"interface {interface!r} is not valid")
        for address in self.pod_addresses:
            try:
                ip_address(address)
            except ValueError as error:
                raise ProtocolError(f"pod_addresses: {error}") from error
        if not self.pod_addresses:
            raise ProtocolError("pod_addresses must name one address at least")
        for name, lowest, highest in (
            ("snap_length", 1, 262144),
            ("ring_bytes", 1 << 19, 1 << 30),
            ("max_file_bytes", self.snap_length + RECORD_HEADER_BYTES + FILE_HEADER_BYTES, 1 << 50),
            ("max_file_age_seconds", 0, 1 << 31),
            ("max_files", 1, 100_000),
        ):
            if not lowest <= getattr(self, name) <= highest:
                raise ProtocolError(f"{name} must be from {lowest} to {highest}, not {getattr(self, name)}")

    @property
    def id(self) -> str:
        """Names the target: a pod is captured once for a PacketCapture."""
        return f"{self.capture_uid}/{self.pod_uid}"


class State(StrEnum):
    """What becomes of a target."""

    STARTING = "Starting"
    CAPTURING = "Capturing"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    FAILED = "Failed"

    @property
    def ended(self) -> bool:
        """Whether nothing is captured any more and all files are closed."""
        return self in {State.STOPPED, State.FAILED}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """A file as a reader may use it: the first `size` bytes are whole records.

    `created` and `closed` are in ns since the epoch, `closed` None while it is written. `last_batch_offset` is where
    the last packets written start, always a record's boundary and at most 4096 records before `size`, so a reader finds
    the last packet's time without reading the file. `dropped` counts packets that the kernel had no room for while this
    file was the current one.
    """

    name: str
    interface: str
    created: int
    size: int
    packets: int
    dropped: int
    last_batch_offset: int
    closed: int | None = None

    @property
    def open(self) -> bool:
        return self.closed is None


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceStatus:
    """One captured interface. `packets` were written to files (some of which rotation has removed by now).

    `seen` is what the interface's own counters say went in and out meanwhile, whether or not the filter let it through.
    """

    interface: str
    state: State
    reason: str = ""
    message: str = ""
    packets: int = 0
    dropped: int = 0
    seen: int = 0
    files: tuple[FileStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """What a target does. `reason` is one CamelCase word, `message` a sentence; both empty when all is well.

    `started` (ns since the epoch) tells one run of a target from a later one.
    """

    target: Target
    started: int
    state: State
    reason: str = ""
    message: str = ""
    interfaces: tuple[InterfaceStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Capture this target; answered with its status once it captures or failed. Harmless when it captures already.

    When only `until` differs from the target that is captured, its end moves and nothing else happens.
    """

    request: int
    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Stop the target, let in what the kernel still holds, close its files; answered with the last status.

    The capturer forgets the target with its answer. Answered with no status when it knows no such target.
    """

    request: int
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Answer with the status of all targets, or of those named; with `flush` after writing out what is buffered."""

    request: int
    ids: tuple[str, ...] | None = None
    flush: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to the request of that number. `error` says why it could not be understood.

    With `more`, other replies to the same request follow, which tell of other targets.

    `worker` is when the worker began, in ns since the epoch: another one means that it died meanwhile.
    """

    request: int
    targets: tuple[TargetStatus, ...] = ()
    error: str = ""
    worker: int = 0
    more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Sent unasked: the target's state changed, its first packet came, or a file was closed and the next one begun.

    Of its files only those are named of which something changed since the last such message; a reply names all.
    """

    target: TargetStatus


Message = Start | Stop | Report | Reply | Changed
_MESSAGES: Final[dict[str, type[Message]]] = {kind.__name__: kind for kind in (Start, Stop, Report, Reply, Changed)}


def encode(message: Message) -> bytes:
    """The message as a line."""
    document = {"kind": type(message).__name__, **dataclasses.asdict(message)}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line. Raises ProtocolError."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("kind") not in _MESSAGES:
        raise ProtocolError(f"kind must be one of {', '.join(_MESSAGES)}")
    kind = _MESSAGES[document.pop("kind")]
    return _decode(kind, document, kind.__name__)


T = TypeVar("T")


def _decode(kind: type[T], value: object, where: str) -> T:
    """`value`, as JSON gave it, as a dataclass of that kind. Raises ProtocolError."""
    if not isinstance(value, dict):
        raise ProtocolError(f"{where} must be an object")
    hints = get_type_hints(kind)
    if unknown := value.keys() - hints.keys():
        raise ProtocolError(f"{where} has no field {', '.join(sorted(map(repr, unknown)))}")
    fields = {name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**fields)
    except TypeError as error:
        raise ProtocolError(f"{where} is incomplete: {error}") from error


def _convert(hint: Any, value: object, where: str) -> object:
    if get_origin(hint) in {Union, types.UnionType}:
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ProtocolError(f"{where} must be a list")
        return tuple(_convert(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _decode(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if issubclass(hint, StrEnum) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError as error:
            raise ProtocolError(f"{where}: {error}") from error
    if type(value) is not hint:  # exact, since bool is an int to isinstance
        raise ProtocolError(f"{where} must be of type {hint.__name__}")
    return value
