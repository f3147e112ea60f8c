"""May this be captured? A policy against a spec, and the words of the answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from api import bpf
from api.capturepolicy import CapturePolicy, FilterRules, InterfaceRules, Limits, SelectorRules
from api.packetcapture import LOOPBACK, Filter, PacketCaptureSpec, format_ports
from api.quantity import format_duration
from api.selector import Labels, PodSelector


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a verdict depends on beside the spec and the policy."""

    now: datetime
    created: datetime | None = None
    """When the capture was created; None for one that is to be created now."""
    namespace_labels: Labels | None = None
    """The labels of its namespace; None where no policy in question asks for them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The policy that allows the capture, or None and, for each usable policy, the first rule that refused."""

    policy: CapturePolicy | None
    refusals: Mapping[str, str]


def judge(spec: PacketCaptureSpec, usable: Iterable[CapturePolicy], circumstances: Circumstances) -> Verdict:
    """A capture is allowed if one policy allows all of it; the first by name is taken, so that answers are stable."""
    refusals = {}
    for policy in sorted(usable, key=lambda policy: policy.metadata.name):
        refusal = refused(spec, policy, circumstances)
        if refusal is None:
            return Verdict(policy, {})
        refusals[policy.metadata.name] = refusal
    return Verdict(None, refusals)


def refused(spec: PacketCaptureSpec, policy: CapturePolicy, circumstances: Circumstances) -> str | None:
    """The first rule of the policy that refuses the capture, in words that say what to change; None when none does."""
    rules = policy.spec
    return (
        _namespace_refused(circumstances.namespace_labels, rules.namespace_selector)
        or _selector_refused(spec.pods(), rules.selectors)
        or _filters_refused(spec.filters, rules.filters)
        or _interfaces_refused(spec.interfaces, rules.interfaces)
        or _times_refused(spec, rules.limits, circumstances)
        or _sizes_refused(spec, rules.limits)
    )


def denial(verdict: Verdict, *, user: str, namespace: str, existing: Sequence[str]) -> str:
    """Why a capture was denied, in one sentence."""
    if verdict.refusals:
        return "; ".join(f"policy {name}: {refusal}" for name, refusal in verdict.refusals.items())
    if not existing:
        return "no CapturePolicy exists: a cluster administrator has to create one"
    names = ", ".join(sorted(existing))
    return (
        f"user {user} may use no CapturePolicy in namespace {namespace} (there are: {names}): "
        "ask for a RoleBinding to a role with verb use on capturepolicies"
    )


def _namespace_refused(labels: Labels | None, selector: PodSelector | None) -> str | None:
    if selector is None or (labels is not None and selector.matches(labels)):
        return None
    return "its namespaceSelector does not select this namespace"


def _selector_refused(selector: PodSelector, rules: SelectorRules) -> str | None:
    if not rules.allow_empty and selector.matches({}):
        return "the selector takes pods without any label too: select by a label that they have"
    for key in rules.required_keys:
        if not selector.values_of(key).are_pinned:
            return f"the selector must list the values of label {key}, with == or in: it could match pods with others"
    for label in rules.forbidden:
        possible = selector.values_of(label.key)
        value = next((value for value in label.values if value in possible), None)
        if value is not None:
            return f"the selector could match pods with {label.key}={value}, which is forbidden: rule that out in it"
    return None


def _filters_refused(filters: Sequence[Filter], rules: FilterRules) -> str | None:
    names_needed = rules.protocols is not None or rules.allowed_ports is not None or bool(rules.denied_ports)
    if not filters:
        return "filters are required" if rules.required or names_needed else None
    for entry in filters:
        if rules.required and entry.protocol is None and not entry.ports:
            return "each filter must name a protocol or ports"
        refusal = _protocol_refused(entry, rules) or _ports_refused(entry, rules)
        if refusal is not None:
            return refusal
    return None


def _protocol_refused(entry: Filter, rules: FilterRules) -> str | None:
    if rules.protocols is None:
        return None
    allowed = ", ".join(rules.protocols) or "none"
    if entry.protocol is None:
        return f"each filter must name a protocol: {allowed}"
    numbers = {_NUMBERS[name] for name in rules.protocols}
    return None if _number(entry.protocol) in numbers else f"protocol {entry.protocol} is not allowed: {allowed} are"


def _ports_refused(entry: Filter, rules: FilterRules) -> str | None:
    if rules.allowed_ports is not None:
        allowed = ", ".join(str(format_ports(ports)) for ports in rules.allowed_ports) or "none"
        if not entry.ports:
            return f"each filter must name ports out of {allowed}"
        for ports in entry.ports:
            if not _within(ports, rules.allowed_ports):
                return f"port {format_ports(ports)} is not allowed: {allowed} are"
    if rules.denied_ports and not entry.ports:
        return _unnamed_ports_refused(entry, rules.denied_ports)
    for low, high in entry.ports:
        for denied_low, denied_high in rules.denied_ports:
            if low <= denied_high and denied_low <= high:
                return f"port {format_ports((max(low, denied_low), min(high, denied_high)))} is denied"
    return None


def _unnamed_ports_refused(entry: Filter, denied_ports: Sequence[tuple[int, int]]) -> str | None:
    """Why an entry without ports could take packets of denied ones; None when its protocol surely holds none."""
    denied = ", ".join(str(format_ports(ports)) for ports in denied_ports)
    number = _number(entry.protocol)
    if number is None or number in _WITH_PORTS:
        return f"a filter without ports could take those that are denied ({denied}): name the ports"
    if number in _INFORMATIONAL:
        if entry.icmp is not None and _message(number, entry.icmp.type) in _INFORMATIONAL[number]:
            return None
        return (
            f"protocol {entry.protocol} needs an icmp.type that is no error, since errors quote packets, "
            f"also of ports that are denied ({denied})"
        )
    if number in _WITHOUT_PORTS:
        return None
    return f"protocol {entry.protocol} is not allowed, since it may hold ports that are denied ({denied})"


def _interfaces_refused(interfaces: Sequence[str], rules: InterfaceRules) -> str | None:
    if rules.allowed is None:
        if LOOPBACK in interfaces:
            return f"interface {LOOPBACK} is not allowed: the policy has to list it in interfaces.allowed"
        return None
    allowed = ", ".join(rules.allowed)
    if not interfaces:
        return f"interfaces must be named, out of {allowed}"
    foreign = next((name for name in interfaces if name not in rules.allowed), None)
    return None if foreign is None else f"interface {foreign} is not allowed: {allowed} are"


def _times_refused(spec: PacketCaptureSpec, limits: Limits, circumstances: Circumstances) -> str | None:
    start, end = spec.start_time, spec.end_time
    if end is None and limits.require_end_time:
        return "endTime is required"
    if end is not None and end - (start or circumstances.created or circumstances.now) > limits.max_duration:
        since = "from startTime to endTime is more than" if start is not None else "endTime is further ahead than"
        return f"{since} {format_duration(limits.max_duration)}"
    if start is not None and start - circumstances.now > limits.max_start_delay:
        return f"startTime is further ahead than {format_duration(limits.max_start_delay)}"
    if limits.max_ttl is not None:
        most = limits.max_ttl // timedelta(seconds=1)
        if spec.ttl_seconds_after_finished is None:
            return f"ttlSecondsAfterFinished is required, at most {most}"
        if spec.ttl_seconds_after_finished > most:
            return f"ttlSecondsAfterFinished is more than {most}"
    return None


def _sizes_refused(spec: PacketCaptureSpec, limits: Limits) -> str | None:
    if spec.rotation.max_file_size > limits.max_file_size:
        return f"rotation.maxFileSize is more than {limits.max_file_size} bytes"
    if spec.rotation.max_files > limits.max_files:
        return f"rotation.maxFiles is more than {limits.max_files}"
    if spec.snap_length > limits.max_snap_length:
        return f"snapLength is more than {limits.max_snap_length}"
    return None


def _within(ports: tuple[int, int], allowed: Sequence[tuple[int, int]]) -> bool:
    """Whether the allowed ranges together cover all of these ports."""
    low, high = ports
    for allowed_low, allowed_high in sorted(allowed):
        if allowed_low <= low <= allowed_high:
            low = allowed_high + 1
    return low > high


def _number(protocol: str | int | None) -> int | None:
    return _NUMBERS[protocol] if isinstance(protocol, str) else protocol


def _message(protocol: int, kind: str | int) -> int:
    return bpf.ICMP_TYPES[protocol][kind] if isinstance(kind, str) else kind


_NUMBERS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
_WITH_PORTS = {6, 17, 132}
_WITHOUT_PORTS = {2, 89, 112}
"""IGMP, OSPF, VRRP (https://www.iana.org/assignments/protocol-numbers). Others may well hold ports: a tunnel's packets
do, also those of PIM's Register (RFC 7761), and so do IPv6 packets that are matched by the number of an extension
header."""
_INFORMATIONAL = {
    _NUMBERS["ICMP"]: {0, 8, 9, 10, *range(13, 19), 42, 43},
    _NUMBERS["ICMPv6"]: set(range(128, 256)) - {bpf.ICMP_TYPES[_NUMBERS["ICMPv6"]]["redirect"]},
}
"""Types of messages that quote no packet, by protocol: ICMP's queries and their answers (RFC 1122, section 3.2.2; RFC
8335), and ICMPv6's informational messages (RFC 4443, section 2.1) but for Redirect, which does (RFC 4861)."""
