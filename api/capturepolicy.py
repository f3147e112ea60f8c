"""`CapturePolicy`: what those who may `use` it may capture."""

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from api.object import Model, ObjectMeta
from api.packetcapture import InterfaceName, Ports, Protocol
from api.quantity import Bytes, Duration
from api.selector import LabelKey, LabelSelector, LabelValue

_Key = Annotated[LabelKey, Field(min_length=1, max_length=317)]
_Value = Annotated[LabelValue, Field(max_length=63)]


class ForbiddenLabel(Model):
    """A label with values that no captured pod may have."""

    key: _Key
    """The label."""
    values: Annotated[list[_Value], Field(min_length=1, max_length=64)]
    """Its forbidden values."""


class SelectorRules(Model):
    """Which selectors are allowed."""

    allow_empty: bool = False
    """Whether a capture may select pods that have no label at all, as all(), and app != 'x', do."""
    required_keys: Annotated[list[_Key], Field(max_length=16)] = Field(default_factory=list)
    """Labels whose values a selector must list, with == or in, or in matchLabels: every pod that it could match has
    each of these labels with a value out of the list."""
    forbidden: Annotated[list[ForbiddenLabel], Field(max_length=32)] = Field(default_factory=list)
    """Labels that no captured pod may have. The selector itself must rule them out, as app == 'web' && tier != 'vault'
    does, so that it stays true for pods that come later."""


class FilterRules(Model):
    """Which filters are allowed."""

    required: bool = False
    """Whether a capture must have filters, each with a protocol or ports, so that none takes all traffic."""
    protocols: Annotated[list[Protocol], Field(max_length=6)] | None = None
    """Each entry of a capture's filters must name one of these. Absent: any protocol, or none."""
    allowed_ports: Annotated[list[Ports], Field(max_length=64)] | None = None
    """Each entry of a capture's filters must name ports, all of them within these. Absent: any ports, or none."""
    denied_ports: Annotated[list[Ports], Field(max_length=64)] = Field(default_factory=list)
    """No entry may name one of these, each that could match TCP, UDP or SCTP must name its ports, and ICMP and ICMPv6
    need a type that is no error, since errors quote other packets. Ports match source or destination: an entry that
    names other ports, such as "1024:65535", still takes packets between one of them and a denied one. Few
    and narrow allowedPorts leave least of that."""


class InterfaceRules(Model):
    """Which interfaces of the pods are allowed."""

    allowed: Annotated[list[InterfaceName], Field(max_length=16)] | None = None
    """Names out of which a capture must name its interfaces. Absent: any but lo, where what sidecars have decrypted
    can be read: lo must be listed."""


class Limits(Model):
    """How much one capture may take. Agents enforce what is stamped, also when the policy changes later."""

    max_duration: Duration = timedelta(hours=1)
    """Longest time from start to end, such as 1h; a capture without endTime ends then."""
    require_end_time: bool = False
    """Whether a capture must say when it ends."""
    max_start_delay: Duration = timedelta(days=7)
    """How far ahead a startTime may lie, such as 7d: until then it takes the place of another capture."""
    max_ttl: Annotated[Duration | None, Field(alias="maxTTL")] = None
    """Longest ttlSecondsAfterFinished, such as 24h; a capture must then have one. Absent: any, or none."""
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
    max_captures_per_user: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Captures under this policy that one user may have active at once, in all namespaces; further ones wait. Whoever
    changed a capture's spec last is its user; an account that people share is one user. Absent: as many as
    namespaces allow."""
    max_pods_per_node: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Pods that one capture may capture at once on a node; of more, those captured first stay. Each node counts for
    itself. Absent: as many as the node allows."""


class CapturePolicySpec(Model):
    """The rules. A capture is allowed if one policy that its user may `use` allows all of it."""

    description: Annotated[str, Field(max_length=1024)] = ""
    """For people: what this policy is for."""
    namespace_selector: LabelSelector | None = None
    """The labels that a namespace must have for its captures to be allowed by this policy. Absent: any namespace."""
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
