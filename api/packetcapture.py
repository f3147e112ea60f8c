"""`PacketCapture`: which packets of which pods, when, and how they are kept."""

from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from api import bpf
from api.object import Condition, Model, ObjectMeta, Timestamp
from api.quantity import Bytes, Duration
from api.selector import LabelSelector, PodSelector, parse

RECORD_OVERHEAD = 40
"""Bytes that a pcap file with one packet needs beside it: the file's header (24) and the record's (16)."""

LARGEST_COUNT = 2**53
"""What every reader of JSON still reads exactly."""

MOST_PORTS = 256
"""Ports and ranges of all filters together: the kernel takes no program of more than 4096 instructions."""

LONGEST_SPEC = 256 * 1024
"""Characters. To read millions of them would hold up who judges captures, and the captures of others with it."""

LOOPBACK = "lo"

Phase = Literal["Scheduled", "WaitingForTraffic", "Capturing", "Finished", "Error"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Protocol = Literal["TCP", "UDP", "ICMP", "ICMPv6", "SCTP", "UDPLite"]
_PROTOCOLS: dict[str, str] = {name.lower(): name for name in get_args(Protocol)}


def parse_protocol(value: object) -> str | int:
    """A protocol's name in any case, or its number (1 to 255), also as a string. Raises `ValueError`."""
    if isinstance(value, str):
        if value.lower() in _PROTOCOLS:
            return _PROTOCOLS[value.lower()]
        if value.isascii() and value.isdigit() and len(value) <= 3:
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 255:
        return value
    raise ValueError(f"{value!r} is no protocol: give {', '.join(_PROTOCOLS.values())} or a number from 1 to 255")


def parse_ports(value: object) -> tuple[int, int]:
    """A port or a range `low:high`, as lowest and highest. Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        low = high = value
    elif (
        isinstance(value, str)
        and value.isascii()
        and all(part.isdigit() and len(part) <= 5 for part in value.split(":", 1))
    ):
        first, _, last = value.partition(":")
        low, high = int(first), int(last or first)
    else:
        raise ValueError(f'{value!r} is no port: give a number from 1 to 65535, or a range such as "8000:8100"')
    if not (1 <= low <= 65535 and 1 <= high <= 65535):
        raise ValueError(f"{value!r} is no port: ports go from 1 to 65535")
    if low > high:
        raise ValueError(f"{value!r} is no range of ports: the first is above the last")
    return low, high


def format_ports(ports: tuple[int, int]) -> str | int:
    low, high = ports
    return low if low == high else f"{low}:{high}"


def parse_icmp_type(value: object) -> str | int:
    """A kind of ICMP or ICMPv6 messages by name in any case, or by number, also as a string. Raises `ValueError`."""
    if isinstance(value, str):
        if value.lower() in _ICMP_TYPES:
            return value.lower()
        if value.isascii() and value.isdigit() and len(value) <= 3:
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255:
        return value
    raise ValueError(
        f"{value!r} is no kind of ICMP messages: give a number from 0 to 255, or {', '.join(sorted(_ICMP_TYPES))}"
    )


_ICMP_TYPES = {name for names in bpf.ICMP_TYPES.values() for name in names}

_INT_OR_STRING = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}

Ports = Annotated[
    tuple[int, int],
    BeforeValidator(parse_ports),
    PlainSerializer(format_ports),
    WithJsonSchema(_INT_OR_STRING),
]

_WITH_PORTS = {bpf.PROTOCOLS[name] for name in bpf.WITH_PORTS}

InterfaceName = Annotated[str, Field(pattern=r"^[^\s/]{1,15}$")]


class ICMP(Model):
    """A kind of ICMP messages, as in Calico's network policies."""

    type: Annotated[str | int, BeforeValidator(parse_icmp_type), WithJsonSchema(_INT_OR_STRING)]
    """Such as echo-request, echo-reply, destination-unreachable, time-exceeded, or a number from 0 to 255."""
    code: Annotated[int, Field(ge=0, le=255)] | None = None
    """A kind within the type, such as 4 (fragmentation needed) of destination-unreachable. Absent: any."""


@lru_cache(maxsize=64)
def _selector(text: str) -> PodSelector:
    """Read once for the many policies that one capture is judged by."""
    return parse(text)


class Filter(Model):
    """Packets of one protocol, on one of these ports. Entries of the list are alternatives. Only a packet's outermost
    IP header is looked at, so that what is in a tunnel passes by the tunnel's protocol and ports."""

    protocol: Annotated[str | int, BeforeValidator(parse_protocol), WithJsonSchema(_INT_OR_STRING)] | None = None
    """TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite, or a number from 1 to 255. Absent: any."""
    ports: Annotated[list[Ports], Field(max_length=64)] = Field(default_factory=list)
    """Ports, or ranges such as "8000:8100", that match the packet's source or destination. Empty: any.
    Only TCP, UDP and SCTP have ports, and fragments but the first have none; of IPv6, no fragment has, nor a packet
    with extension headers."""
    icmp: ICMP | None = None
    """The kind of messages, only with protocol ICMP or ICMPv6. Absent: any."""

    @model_validator(mode="after")
    def _ports_fit_the_protocol(self) -> "Filter":
        if self.ports and self.protocol is not None and bpf.number(self.protocol) not in _WITH_PORTS:
            raise ValueError(f"ports can't be matched with protocol {self.protocol}: only TCP, UDP and SCTP have them")
        return self

    @model_validator(mode="after")
    def _messages_fit_the_protocol(self) -> "Filter":
        if self.icmp is None:
            return self
        known = None if self.protocol is None else bpf.ICMP_TYPES.get(bpf.number(self.protocol))
        if known is None:
            raise ValueError("icmp needs protocol ICMP or ICMPv6")
        if isinstance(self.icmp.type, str) and self.icmp.type not in known:
            raise ValueError(
                f"protocol {self.protocol} has no {self.icmp.type}: give a number, or {', '.join(sorted(known))}"
            )
        return self


class Rotation(Model):
    """How the packets of one captured interface are spread over files; the oldest file goes when there are too many."""

    max_file_size: Bytes = 10_000_000
    """No file grows beyond this, such as 10M; at least snapLength + 40 bytes."""
    max_file_age: Duration | None = None
    """A new file is begun after this time, such as 1h, also without traffic. Absent: only by size."""
    max_files: Annotated[int, Field(ge=1, le=100)] = 2
    """Files kept for each captured interface."""


class PacketCaptureSpec(Model):
    """What shall be captured. Any change is judged as a new capture is, but for an earlier end and for suspending."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": "has(self.selector) != has(self.podSelector)",
                    "message": "give exactly one of selector and podSelector",
                },
                {
                    "rule": "!has(self.startTime) || !has(self.endTime) || self.endTime > self.startTime",
                    "message": "endTime must be after startTime",
                    "fieldPath": ".endTime",
                },
            ]
        }
    )

    selector: Annotated[str, Field(max_length=4096)] | None = None
    """The pods, in Calico's selector grammar, such as: app == "nginx" && tier in {"web", "cache"}.
    It selects among the pods of the capture's own namespace. Exactly one of selector and podSelector is given."""
    pod_selector: LabelSelector | None = None
    """The pods, as a Kubernetes label selector. Exactly one of selector and podSelector is given."""
    filters: Annotated[list[Filter], Field(max_length=32)] = Field(default_factory=list)
    """Which packets: those that at least one entry lets through. Empty: all packets of the pods."""
    start_time: Timestamp | None = None
    """Nothing is captured before this moment. Absent: from the start."""
    end_time: Timestamp | None = None
    """Nothing is captured after this moment. Absent: until the capture is deleted, or for the policy's longest
    duration."""
    suspend: bool = False
    """True stops the capture and keeps its files."""
    interfaces: Annotated[list[InterfaceName], Field(max_length=16)] = Field(default_factory=list)
    """Interfaces of the pods, such as eth0 or lo. Empty: all of them but the loopback. On lo is what the containers of
    a pod say to each other, also what a sidecar has decrypted."""
    snap_length: Annotated[int, Field(ge=64, le=262144)] = 262144
    """Bytes kept of each packet. Pods' packets can be larger than the network's, by segmentation offload."""
    rotation: Rotation = Field(default_factory=Rotation)
    """How much is kept, for each captured interface."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """The capture, and its files with it, is deleted this many seconds after its end. Absent: never."""

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, spec: object) -> object:
        if len(str(spec)) > LONGEST_SPEC:
            raise ValueError(f"it is longer than {LONGEST_SPEC:,} characters")
        return spec

    @model_validator(mode="after")
    def _is_sound(self) -> "PacketCaptureSpec":
        if (self.selector is None) == (self.pod_selector is None):
            raise ValueError("give exactly one of selector and podSelector")
        if self.start_time is not None and self.end_time is not None and self.end_time <= self.start_time:
            raise ValueError("endTime must be after startTime")
        ports = sum(len(entry.ports) for entry in self.filters)
        if ports > MOST_PORTS:
            raise ValueError(
                f"filters name {ports} ports and ranges, and at most {MOST_PORTS} can be compiled for the kernel: "
                "give ranges, or fewer"
            )
        if self.rotation.max_file_size < self.snap_length + RECORD_OVERHEAD:
            raise ValueError(
                f"rotation.maxFileSize must be at least snapLength + {RECORD_OVERHEAD} bytes, "
                f"here {self.snap_length + RECORD_OVERHEAD}"
            )
        try:
            self.pods()
        except ValueError as error:
            raise ValueError(f"selector: {error}") from error
        return self

    def pods(self) -> PodSelector:
        """The selector, whichever of the two is given."""
        if self.pod_selector is not None:
            return self.pod_selector
        return _selector(self.selector or "")

    def filter_expression(self) -> str:
        """What libpcap compiles."""
        return bpf.expression(self.filters)


class NodeSummary(Model):
    """What one node says of this capture."""

    node: str
    """The node."""
    state: Phase
    """The capture's state on this node."""
    reason: str = ""
    """Why, in one word."""
    message: str = ""
    """Why, in words."""
    pods: int = 0
    """Pods that are captured there."""
    packets: int = 0
    """Packets written."""
    bytes: int = 0
    """Size of the files."""
    dropped: int = 0
    """Packets that passed the filter and were lost."""
    seen: int = 0
    """Packets that the pods' interfaces counted meanwhile, whether or not the filter let them through."""
    evicted: int = 0
    """Files removed to keep the disk's limits."""
    interruptions: int = 0
    """Times that capturing was interrupted; what came until it went on is in no file."""


class PacketCaptureStatus(Model):
    """What is captured. Written by the controller alone."""

    phase: Phase | None = None
    """Scheduled, WaitingForTraffic, Capturing, Finished or Error."""
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(
        default_factory=list,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """Admitted, Capturing, PodsMatched, Complete, DiskPressure and Degraded, each with a reason and a message."""
    pods: int = 0
    """Pods that are captured now, on all nodes."""
    packets: int = 0
    """Packets written, on all nodes."""
    bytes: int = 0
    """Size of the files, on all nodes."""
    dropped: int = 0
    """Packets that passed the filter and were lost, on all nodes."""
    seen: int = 0
    """Packets that the pods' interfaces counted meanwhile, whether or not the filter let them through, on all nodes."""
    evicted: int = 0
    """Files removed to keep the disk's limits, on all nodes."""
    interruptions: int = 0
    """Times that capturing was interrupted, on all nodes; what came until it went on is in no file."""
    agents: int = 0
    """Nodes whose agent speaks. By it agents know how far to spread their writes over time."""
    finished_time: Timestamp | None = None
    """When the capture came to its end."""
    nodes: Annotated[list[NodeSummary], Field(max_length=100)] = Field(default_factory=list)
    """Nodes, troubled ones first, at most 25; a CaptureNode tells all of its node."""
    more_nodes: int = 0
    """Nodes beyond those listed."""

    def condition(self, kind: str) -> Condition | None:
        return next((condition for condition in self.conditions if condition.type == kind), None)

    def to_json(self) -> dict[str, Any]:
        """The nodes without what is zero or empty: each write goes to every node of the cluster."""
        nodes = [node.model_dump(mode="json", exclude_defaults=True) for node in self.nodes]
        return super().to_json() | {"nodes": nodes}


class PacketCapture(Model):
    """A capture of packets of pods, started by creating it and ended by deleting it, by suspend or by its end time."""

    metadata: ObjectMeta
    spec: PacketCaptureSpec
    """What shall be captured."""
    status: PacketCaptureStatus = Field(default_factory=PacketCaptureStatus)
    """What is captured."""

    @property
    def starts(self) -> datetime | None:
        """When capturing may begin: the start time, else the creation."""
        return self.spec.start_time or self.metadata.creation_timestamp
