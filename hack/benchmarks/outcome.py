"""What a benchmark has to say: rows of numbers with their goals, for a person as a table and for a machine as JSON."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from hack.benchmarks.machine import Machine


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    lowest: float
    highest: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """At least one value; p90 is the smallest value that 90 % do not exceed."""
        ordered = sorted(values)
        ninetieth = ordered[max(0, -(-len(ordered) * 9 // 10) - 1)]
        return cls(statistics.median(ordered), ordered[0], ordered[-1], ninetieth, len(ordered))

    def __str__(self) -> str:
        middle = number(self.median)
        if self.count == 1 or self.lowest == self.highest:
            return middle
        return f"{middle} ({number(self.lowest)}–{number(self.highest)})"


@dataclass(frozen=True, slots=True)
class Goal:
    """What was promised, what was measured, and whether that keeps the promise; None where it can't be told."""

    text: str
    measured: str
    reached: bool | None

    def __str__(self) -> str:
        verdict = "UNKNOWN" if self.reached is None else "reached" if self.reached else "MISSED"
        return f"{verdict}: {self.text}, measured {self.measured}"


Cell = Spread | str | int | float | None


@dataclass(slots=True)
class Outcome:
    """`rows` all have the same columns, in the order of the table; `goals` are of the benchmark as a whole."""

    benchmark: str
    machine: Machine
    method: str
    rows: list[Mapping[str, Cell]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def text(self) -> str:
        """The outcome for a person."""
        lines = [f"{self.benchmark} on {self.machine}", self.method, "", *table(self.rows)]
        return "\n".join([*lines, "", *map(str, self.goals)] if self.goals else lines)

    def json(self) -> str:
        """The outcome for a machine."""
        document: dict[str, Any] = asdict(self)
        return json.dumps(document, indent=2)


def table(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """The rows as lines of text below their columns' names, numbers to the right."""
    if not rows:
        return []
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    right = [all(not isinstance(row[column], str) for row in rows) for column in columns]
    widths = [max(map(len, [name, *(line[at] for line in cells)])) for at, name in enumerate(columns)]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [columns, *cells]
    ]


def number(value: float) -> str:
    """Three significant digits, or all of a whole number."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, int | float) else str(value)
