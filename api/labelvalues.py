"""Which values a label can have on the pods that a selector matches, as far as its text shows.

What is said here is never too little: a pod that the selector matches has one of the values. It may be too much, since
each label is looked at by itself: `(a == 'x' && a == 'y') || b == 'z'` matches nothing without `b`, and is not seen
through. So rules that refuse by it refuse in doubt.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_


@dataclass(frozen=True, slots=True)
class LabelValues:
    """The `listed` values, or with `are_excluded` all values but those; None stands for the label's absence."""

    listed: frozenset[str | None]
    are_excluded: bool = False

    @classmethod
    def only(cls, *values: str | None) -> "LabelValues":
        return cls(frozenset(values))

    @classmethod
    def other_than(cls, *values: str | None) -> "LabelValues":
        return cls(frozenset(values), are_excluded=True)

    @classmethod
    def all_of(cls, several: Iterable["LabelValues"]) -> "LabelValues":
        """The values that are in each of them."""
        return reduce(and_, several, ANY)

    @classmethod
    def any_of(cls, several: Iterable["LabelValues"]) -> "LabelValues":
        """The values that are in at least one of them."""
        return reduce(or_, several, ~ANY)

    @property
    def are_pinned(self) -> bool:
        """Whether the label is there, with one of finitely many values."""
        return not self.are_excluded and None not in self.listed

    def __contains__(self, value: str | None) -> bool:
        return (value in self.listed) is not self.are_excluded

    def __invert__(self) -> "LabelValues":
        return LabelValues(self.listed, not self.are_excluded)

    def __and__(self, other: "LabelValues") -> "LabelValues":
        if self.are_excluded and other.are_excluded:
            return LabelValues(self.listed | other.listed, are_excluded=True)
        if self.are_excluded:
            return other & self
        return LabelValues(frozenset(value for value in self.listed if value in other))

    def __or__(self, other: "LabelValues") -> "LabelValues":
        return ~(~self & ~other)


ANY = LabelValues.other_than()
