"""Sizes and durations as Kubernetes writes them: `10M`, `512Ki`, `1h30m`."""

import re
from datetime import timedelta
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SUFFIXES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)(k|M|G|T|Ki|Mi|Gi|Ti)?")
_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(d|h|ms|m|s)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")


def parse_quantity(value: object) -> int:
    """Bytes, from a number or a Kubernetes quantity (`resource.Quantity`) of whole bytes. Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        size = Decimal(match[1]) * _SUFFIXES[match[2] or ""]
        if size == int(size):
            return int(size)
    raise ValueError(f"{value!r} is no size: give bytes, or a number with k, M, G, Ki, Mi or Gi, such as 10M")


def parse_duration(value: object) -> timedelta:
    """A duration as Go writes it (`time.ParseDuration`), and with `d` for days. Raises `ValueError`."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str) and _DURATION.fullmatch(value):
        milliseconds = sum(Decimal(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(value))
        if milliseconds <= 36_525 * _UNITS["d"]:
            return timedelta(milliseconds=float(milliseconds))
    raise ValueError(f"{value!r} is no duration: give a number with d, h, m or s, such as 90s or 1h30m")


def format_duration(duration: timedelta) -> str:
    """As `time.Duration` prints it: `1h30m0s`."""
    milliseconds = round(duration / timedelta(milliseconds=1))
    if milliseconds == 0:
        return "0s"
    text = ""
    for unit in ("h", "m", "s", "ms"):
        count, milliseconds = divmod(milliseconds, _UNITS[unit])
        if count or (text and unit != "ms"):
            text += f"{count}{unit}"
    return text


Bytes = Annotated[
    int,
    BeforeValidator(parse_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": r"^\d{1,18}(\.\d{1,9})?(k|M|G|T|Ki|Mi|Gi|Ti)?$",
        }
    ),
]
"""A size in bytes; in manifests a number or a quantity."""

Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^(\d{1,9}(\.\d{1,9})?(d|h|ms|m|s))+$", "maxLength": 64}),
]
"""A span of time; in manifests as Go writes it, or in days."""
