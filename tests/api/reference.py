"""A second opinion on verdicts: the rules as anyone would write them down, tried out on every pod and packet of a small
world instead of reasoned about. It works on JSON, and takes nothing from the code that it is compared with.

Selectors of Calico's grammar are trees here, such as `("and", ("==", "a", "x"), ("has", "b"))`; `text` writes them.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

Json = dict[str, Any]
Tree = tuple[Any, ...]
Labels = dict[str, str]
Packet = tuple[int, int | None]
"""Protocol and port."""

KEYS = ("a", "b")
MENTIONED = ("x", "y", "")
"""Values that selectors and policies name."""
UNMENTIONED = ("xy", "z")
"""Values that none of them names, and some of them match."""
PODS: list[Labels] = [
    {key: value for key, value in zip(KEYS, values, strict=True) if value is not None}
    for values in product((None, *MENTIONED, *UNMENTIONED), repeat=len(KEYS))
]

PORTS = range(1, 13)
NUMBERS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
WITH_PORTS = {6, 17, 132, 136}
TUNNELS = {41, 47, 60, 103}
MESSAGES: dict[int, dict[str | int, bool]] = {
    1: {"echo-request": False, "time-exceeded": True, 5: True, 10: False},
    58: {0: True, 137: True, 143: False},
}
"""Some kinds of ICMP and ICMPv6 messages, and whether they quote another packet."""
PROTOCOLS = {*NUMBERS.values(), *TUNNELS, 2}
PACKETS: set[Packet] = {
    (protocol, port)
    for protocol in PROTOCOLS
    for port in (PORTS if protocol in WITH_PORTS else (None, *PORTS) if protocol in {*TUNNELS, *MESSAGES} else (None,))
}
"""What a tunnel carries, or an ICMP message quotes, has ports, or none."""


def text(tree: Tree) -> str:
    """The selector as a user writes it."""
    match tree:
        case ("and", *operands):
            return " && ".join(f"({text(operand)})" for operand in operands)
        case ("or", *operands):
            return " || ".join(f"({text(operand)})" for operand in operands)
        case ("not", operand):
            return f"!({text(operand)})"
        case ("all",):
            return "all()"
        case ("has", key):
            return f"has({key})"
        case (("in" | "not in") as operation, key, *values):
            listed = ", ".join(f"'{value}'" for value in values)
            return f"{key} {operation} {{{listed}}}"
        case (operation, key, value):
            return f"{key} {operation} '{value}'"
    raise ValueError(tree)


def selects(tree: Tree, pod: Labels) -> bool:
    """Whether the selector matches a pod."""
    match tree:
        case ("and", *operands):
            return all(selects(operand, pod) for operand in operands)
        case ("or", *operands):
            return any(selects(operand, pod) for operand in operands)
        case ("not", operand):
            return not selects(operand, pod)
        case ("all",):
            return True
        case ("has", key):
            return key in pod
    operation, key, *values = tree
    if operation in ("!=", "not in"):
        return key not in pod or pod[key] not in values
    if key not in pod:
        return False
    found = pod[key]
    return {
        "==": found in values,
        "in": found in values,
        "contains": any(value in found for value in values),
        "starts with": any(found.startswith(value) for value in values),
        "ends with": any(found.endswith(value) for value in values),
    }[operation]


def fits(selector: Json, labels: Labels) -> bool:
    """Whether a LabelSelector matches these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if key not in labels or labels[key] != value:
            return False
    for entry in selector.get("matchExpressions", []):
        key, values = entry["key"], entry.get("values", [])
        holds = {
            "In": key in labels and labels[key] in values,
            "NotIn": key not in labels or labels[key] not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[entry["operator"]]
        if not holds:
            return False
    return True


def denies(policy: Json, spec: Json, *, tree: Tree | None, namespace: Labels, now: int) -> bool:
    """Whether the policy's rules are broken, by any pod or packet that the capture could take.

    `tree` is the capture's `selector`, None where it has a `podSelector`. Times are in seconds, in the spec as well.
    """
    selected = [pod for pod in PODS if (selects(tree, pod) if tree else fits(spec["podSelector"], pod))]
    return (
        not fits(policy.get("namespaceSelector", {}), namespace)
        or any(_pod_is_denied(pod, policy.get("selectors", {})) for pod in selected)
        or _filters_are_denied(spec.get("filters", []), policy.get("filters", {}))
        or any(
            interface not in policy.get("interfaces", {}).get("allowed", {"eth0", "net1", "strange"})
            for interface in spec.get("interfaces") or ["eth0", "net1", "strange"]
        )
        or _times_are_denied(spec, policy.get("limits", {}), now)
        or _sizes_are_denied(spec, policy.get("limits", {}))
    )


def _pod_is_denied(pod: Labels, rules: Json) -> bool:
    return (
        (not pod and not rules.get("allowEmpty", False))
        or any(pod.get(key) not in MENTIONED for key in rules.get("requiredKeys", []))
        or any(pod.get(label["key"]) in label["values"] for label in rules.get("forbidden", []))
    )


def _filters_are_denied(filters: list[Json], rules: Json) -> bool:
    if rules.get("required", False) and (not filters or any(_taken(entry) == PACKETS for entry in filters)):
        return True
    taken = {packet for entry in filters for packet in _taken(entry)} if filters else PACKETS
    protocols = {NUMBERS[name] for name in rules["protocols"]} if "protocols" in rules else PROTOCOLS
    allowed = set(_ports(rules["allowedPorts"])) if "allowedPorts" in rules else {None, *PORTS}
    denied = set(_ports(rules.get("deniedPorts", [])))
    return any(protocol not in protocols or port not in allowed or port in denied for protocol, port in taken)


def _taken(entry: Json) -> set[Packet]:
    protocol = entry.get("protocol")
    number = NUMBERS.get(protocol, protocol) if protocol is not None else None
    ports = set(_ports(entry.get("ports", [])))
    if number is not None and "icmp" in entry:
        return {(number, port) for port in ((None, *PORTS) if MESSAGES[number][entry["icmp"]["type"]] else (None,))}
    return {
        packet
        for packet in PACKETS
        if (number is None or packet[0] == number) and (not ports or (packet[0] in {6, 17, 132} and packet[1] in ports))
    }


def _ports(entries: list[int | str]) -> Iterator[int]:
    for entry in entries:
        first, _, last = str(entry).partition(":")
        yield from range(int(first), int(last or first) + 1)


def _times_are_denied(spec: Json, limits: Json, now: int) -> bool:
    begins = spec.get("startTime", now)
    ends = spec.get("endTime")
    kept = spec.get("ttlSecondsAfterFinished")
    return (
        (ends is None and limits.get("requireEndTime", False))
        or (ends is not None and ends - begins > limits.get("maxDuration", 3600))
        or begins - now > limits.get("maxStartDelay", 7 * 86400)
        or ("maxTTL" in limits and (kept is None or kept > limits["maxTTL"]))
    )


def _sizes_are_denied(spec: Json, limits: Json) -> bool:
    rotation = spec.get("rotation", {})
    asked = (rotation.get("maxFileSize", 10_000_000), rotation.get("maxFiles", 2), spec.get("snapLength", 262144))
    most = (limits.get("maxFileSize", 100_000_000), limits.get("maxFiles", 10), limits.get("maxSnapLength", 262144))
    return any(one > limit for one, limit in zip(asked, most, strict=True))
