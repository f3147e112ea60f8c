"""Values that a label can have, as far as a selector shows."""

from collections.abc import Callable, Iterable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.labelvalues import ANY, LabelValues
from api.selector import LabelSelector, parse

SOME = [None, "", "a", "b"]


@pytest.mark.parametrize("one", [LabelValues.only(None, "a"), LabelValues.other_than("a"), ANY, ~ANY])
@pytest.mark.parametrize("other", [LabelValues.only("a", "b"), LabelValues.other_than(None, "b"), ANY, ~ANY])
def test_they_are_sets(one: LabelValues, other: LabelValues) -> None:
    for value in SOME:
        assert (value in ~one) is (value not in one)
        assert (value in LabelValues.all_of([one, other])) is (value in one and value in other)
        assert (value in LabelValues.any_of([one, other])) is (value in one or value in other)
    assert LabelValues.all_of([]) == ANY
    assert LabelValues.any_of([]) == ~ANY


@pytest.mark.parametrize("join", [LabelValues.all_of, LabelValues.any_of])
@pytest.mark.parametrize("make", [LabelValues.only, LabelValues.other_than])
def test_joining_many_makes_no_sets_on_the_way(
    join: Callable[[Iterable[LabelValues]], LabelValues],
    make: Callable[..., LabelValues],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = [make(f"v{number}", "shared") for number in range(500)]
    given = sum(len(values.listed) for values in many)
    made: list[int] = []
    initialize = LabelValues.__init__

    def counted(self: LabelValues, listed: frozenset[str | None], are_excluded: bool = False) -> None:
        made.append(len(listed))
        initialize(self, listed, are_excluded)

    monkeypatch.setattr(LabelValues, "__init__", counted)
    join(many)
    assert 0 < sum(made) <= 3 * given


def test_they_are_pinned_when_listed_and_never_absent() -> None:
    assert LabelValues.only("a", "").are_pinned
    assert (~ANY).are_pinned
    for loose in (LabelValues.only("a", None), LabelValues.other_than("a"), LabelValues.other_than(None), ANY):
        assert not loose.are_pinned


_OPERATIONS = [
    "{0} == '{1}'",
    "{0} != '{1}'",
    "{0} in {{'{1}', 'q'}}",
    "{0} not in {{'{1}', ''}}",
    "has({0})",
    "{0} contains '{1}'",
    "{0} starts with '{1}'",
    "{0} ends with '{1}'",
    "all()",
]
_atoms = st.builds(str.format, st.sampled_from(_OPERATIONS), st.sampled_from("xy"), st.sampled_from(["a", "b", ""]))
_texts = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.builds("({}) && ({})".format, inner, inner),
        st.builds("({}) || ({})".format, inner, inner),
        st.builds("!({})".format, inner),
    ),
    max_leaves=6,
)
_VALUES = [None, "", "a", "b", "q", "ab", "z"]


@given(_texts)
def test_a_pod_that_a_selector_matches_has_one_of_its_values(text: str) -> None:
    selector = parse(text)
    x, y = selector.values_of("x"), selector.values_of("y")
    for first, second in product(_VALUES, repeat=2):
        labels = {key: value for key, value in (("x", first), ("y", second)) if value is not None}
        if selector.matches(labels):
            assert first in x
            assert second in y


_requirements = st.one_of(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from("xy"),
            "operator": st.sampled_from(["In", "NotIn"]),
            "values": st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=2),
        }
    ),
    st.fixed_dictionaries({"key": st.sampled_from("xy"), "operator": st.sampled_from(["Exists", "DoesNotExist"])}),
)


@given(
    st.dictionaries(st.sampled_from("xy"), st.sampled_from(["a", "b", ""]), max_size=2),
    st.lists(_requirements, max_size=3),
)
def test_of_a_label_selector_they_are_exact(labels: dict[str, str], requirements: list[dict[str, object]]) -> None:
    selector = LabelSelector.model_validate({"matchLabels": labels, "matchExpressions": requirements})
    matched = [
        (first, second)
        for first, second in product(_VALUES, repeat=2)
        if selector.matches({key: value for key, value in (("x", first), ("y", second)) if value is not None})
    ]
    if matched:
        assert {value for value in _VALUES if value in selector.values_of("x")} == {first for first, _ in matched}
        assert {value for value in _VALUES if value in selector.values_of("y")} == {second for _, second in matched}
