"""May this be captured? A policy against a spec, and the words of the answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from api.capturepolicy import CapturePolicy, FilterRules, InterfaceRules, Limits
from api.packetcapture import LOOPBACK, Filter, PacketCaptureSpec, format_ports
from api.quantity import format_duration


@dataclass(frozen=True, slots=True)
class Verdict:
    """The policy that allows the capture, or None and, for each usable policy, the first rule that refused."""

    policy: CapturePolicy | None
    refusals: Mapping[str, str]


def judge(spec: PacketCaptureSpec, usable: Iterable[CapturePolicy]) -> Verdict:
    """A capture is allowed if one policy allows all of it; the first by name is taken, so that answers are stable."""
    refusals = {}
    for policy in sorted(usable, key=lambda policy: policy.metadata.name):
        refusal = refused(spec, policy)
        if refusal is None:
            return Verdict(policy, {})
        refusals[policy.metadata.name] = refusal
    return Verdict(None, refusals)


def refused(spec: PacketCaptureSpec, policy: CapturePolicy) -> str | None:
    """The first rule of the policy that refuses the capture, in words that say what to change; None when none does."""
    rules = policy.spec
    if not rules.selectors.allow_empty and spec.pods().matches({}):
        return "the selector takes pods without any label too: select by a label that they have"
    return (
        _filters_refused(spec.filters, rules.filters)
        or _interfaces_refused(spec.interfaces, rules.interfaces)
        or _limits_refused(spec, rules.limits)
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


def _filters_refused(filters: Sequence[Filter], rules: FilterRules) -> str | None:
    names_needed = rules.protocols is not None or rules.allowed_ports is not None or bool(rules.denied_ports)
    if not filters:
        return "filters are required" if rules.required or names_needed else None
    for entry in filters:
        refusal = _protocol_refused(entry, rules) or _ports_refused(entry, rules)
        if refusal is not None:
            return refusal
    return None


def _protocol_refused(entry: Filter, rules: FilterRules) -> str | None:
    if rules.protocols is None:
        return None
    allowed = ", ".join(rules.protocols)
    if entry.protocol is None:
        return f"each filter must name a protocol: {allowed}"
    numbers = {_NUMBERS[name] for name in rules.protocols}
    number = entry.protocol if isinstance(entry.protocol, int) else _NUMBERS[entry.protocol]
    return None if number in numbers else f"protocol {entry.protocol} is not allowed: {allowed} are"


def _ports_refused(entry: Filter, rules: FilterRules) -> str | None:
    if rules.allowed_ports is not None:
        allowed = ", ".join(str(format_ports(ports)) for ports in rules.allowed_ports)
        if not entry.ports:
            return f"each filter must name ports out of {allowed}"
        for ports in entry.ports:
            if not _within(ports, rules.allowed_ports):
                return f"port {format_ports(ports)} is not allowed: {allowed} are"
    if rules.denied_ports and not entry.ports and _may_have_ports(entry):
        denied = ", ".join(str(format_ports(ports)) for ports in rules.denied_ports)
        return f"a filter without ports could take those that are denied ({denied}): name the ports"
    for low, high in entry.ports:
        for denied_low, denied_high in rules.denied_ports:
            if low <= denied_high and denied_low <= high:
                return f"port {format_ports((max(low, denied_low), min(high, denied_high)))} is denied"
    return None


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


def _limits_refused(spec: PacketCaptureSpec, limits: Limits) -> str | None:
    longest = format_duration(limits.max_duration)
    start, end = spec.start_time, spec.end_time
    if start is not None and end is not None and end - start > limits.max_duration:
        return f"from startTime to endTime is more than {longest}"
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


def _may_have_ports(entry: Filter) -> bool:
    if entry.protocol is None:
        return True
    number = entry.protocol if isinstance(entry.protocol, int) else _NUMBERS[entry.protocol]
    return number in _WITH_PORTS


_NUMBERS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
_WITH_PORTS = {6, 17, 132, 136}
