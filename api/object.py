"""What all objects share: how they are read and written, metadata, conditions."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

GROUP = "kubepcap.io"
SUBRESOURCES_GROUP = "subresources.kubepcap.io"
VERSION = "v1"

_LONGEST_SHOWN = 500
"""Characters of a message, or of a path: some quote what was given, whatever its size."""

_MOST_PROBLEMS = 10
"""Told of one value; who has more of them than that has written something else."""


def format_timestamp(moment: datetime) -> str:
    """`metav1.Time`: RFC 3339, UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _bounded(moment: datetime) -> datetime:
    """Far from the ends of what can be computed with: adding durations must never overflow."""
    if not 1970 <= moment.year <= 9000:
        raise ValueError("give a time between the years 1970 and 9000")
    return moment


Timestamp = Annotated[
    AwareDatetime,
    AfterValidator(_bounded),
    PlainSerializer(format_timestamp, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""`metav1.Time`."""


class Model(BaseModel):
    """Immutable, camelCase on the wire; fields that this release does not know are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """As Kubernetes writes it: camelCase, absent fields left out."""
        return self.model_dump(mode="json", exclude_none=True)


class ObjectMeta(Model):
    """Those fields of `metav1.ObjectMeta` that decisions need."""

    name: str = ""
    namespace: str | None = None
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Condition(Model):
    """`metav1.Condition`: one aspect of the state, with a reason for programs and a message for people."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    last_transition_time: Timestamp
    observed_generation: int | None = None


def explain(error: ValidationError, *, root: str = "") -> str:
    """What is wrong with a value from outside, in words a person can act on: `spec.filters[0].ports[0]: …`."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for problem in problems[:_MOST_PROBLEMS]:
        path = root
        for part in problem["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        message = _shortened(problem["msg"].removeprefix("Value error, "))
        lines.append(f"{_shortened(path)}: {message}" if path else message)
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"and {len(problems) - _MOST_PROBLEMS} more problems")
    return "; ".join(lines)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
