"""Which values a label can have on the pods that a selector matches, as far as its text shows.

What is said here is never too little: a pod that the selector matches has one of the values. It may be too much, since
each label is looked at by itself: `(a == 'x' && a == 'y') || b == 'z'` matches nothing without `b`, and is not seen
through. So rules that refuse by it refuse in doubt.
"""

from collections.abc import Iterable
from dataclasses import dataclass


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
        """The values that are in each of them. Takes time in proportion to how many are listed."""
        several = list(several)
        excluded = frozenset[str | None]().union(*(values.listed for values in several if values.are_excluded))
        listed = [values.listed for values in several if not values.are_excluded]
        if not listed:
            return cls(excluded, are_excluded=True)
        return cls(listed[0].intersection(*listed[1:]) - excluded)

    @classmethod
    def any_of(cls, several: Iterable["LabelValues"]) -> "LabelValues":
        """The values that are in at least one of them."""
        return ~cls.all_of(~values for values in several)

    @property
    def are_pinned(self) -> bool:
        """Whether the label is there, with one of finitely many values."""
        return not self.are_excluded and None not in self.listed

    def __contains__(self, value: str | None) -> bool:
        return (value in self.listed) is not self.are_excluded

    def __invert__(self) -> "LabelValues":
        return LabelValues(self.listed, not self.are_excluded)


ANY = LabelValues.other_than()
