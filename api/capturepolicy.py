"""`CapturePolicy`: what those who may `use` it may capture."""

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from api.object import Model, ObjectMeta
from api.packetcapture import InterfaceName, Ports, Protocol
from api.quantity import Bytes, Duration


class SelectorRules(Model):
    """Which selectors are allowed."""

    allow_empty: bool = False
    """Whether a capture may select pods that have no label at all, as all(), and app != 'x', do."""


class FilterRules(Model):
    """Which filters are allowed."""

    required: bool = False
    """Whether a capture must have filters, so that it can't take all traffic."""
    protocols: Annotated[list[Protocol], Field(max_length=6)] | None = None
    """Each entry of a capture's filters must name one of these. Absent: any protocol, or none."""
    allowed_ports: Annotated[list[Ports], Field(max_length=64)] | None = None
    """Each entry of a capture's filters must name ports, all of them within these. Absent: any ports, or none."""
    denied_ports: Annotated[list[Ports], Field(max_length=64)] = Field(default_factory=list)
    """No entry may name one of these; and each entry that could match TCP, UDP or SCTP must then name its ports."""


class InterfaceRules(Model):
    """Which interfaces of the pods are allowed."""

    allowed: Annotated[list[InterfaceName], Field(max_length=16)] | None = None
    """Names out of which a capture must name its interfaces. Absent: any but lo, where what sidecars have decrypted
    can be read: lo must be listed."""


class Limits(Model):
    """How much one capture may take. Agents enforce what is stamped, also when the policy changes later."""

    max_duration: Duration = timedelta(hours=1)
    """Longest time from start to end, such as 1h; a capture without endTime ends then."""
    max_file_size: Bytes = 100_000_000
    """Largest rotation.maxFileSize."""
    max_files: Annotated[int, Field(ge=1, le=100)] = 10
    """Largest rotation.maxFiles."""
    max_snap_length: Annotated[int, Field(ge=64, le=262144)] = 262144
    """Largest snapLength."""
    ring_size: Annotated[Bytes, Field(ge=1 << 19, le=1 << 30)] = 4 << 20
    """Memory of the node, for each captured interface, in which packets wait to be written: more of it survives longer
    bursts."""
    max_bytes_per_node: Bytes = 2_000_000_000
    """Bytes that all files of one capture may take on one node. Beyond that its oldest finished files go first, then it
    pauses."""
    max_captures_per_namespace: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Captures under this policy that may be active at once in a namespace; further ones wait."""


class CapturePolicySpec(Model):
    """The rules. A capture is allowed if one policy that its user may `use` allows all of it."""

    description: Annotated[str, Field(max_length=1024)] = ""
    """For people: what this policy is for."""
    selectors: SelectorRules = Field(default_factory=SelectorRules)
    """Which selectors are allowed."""
    filters: FilterRules = Field(default_factory=FilterRules)
    """Which filters are allowed."""
    interfaces: InterfaceRules = Field(default_factory=InterfaceRules)
    """Which interfaces of the pods are allowed."""
    limits: Limits = Field(default_factory=Limits)
    """How much one capture may take."""


class CapturePolicy(Model):
    """Rules for the captures of those who may `use` it: verb use on capturepolicies, in a namespace or everywhere."""

    metadata: ObjectMeta
    spec: CapturePolicySpec = Field(default_factory=CapturePolicySpec)
    """The rules."""
