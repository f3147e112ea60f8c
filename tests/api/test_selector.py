"""Selectors: Calico's grammar and Kubernetes' label selectors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.selector import LabelSelector, SelectorError, parse

WEB = {"app": "nginx", "tier": "web", "k8s.io/part-of": "shop", "empty": ""}

MATCHES = [
    ("", True),
    ("all()", True),
    ("global()", True),
    ("app == 'nginx'", True),
    ('app == "nginx"', True),
    ("app=='nginx'", True),
    ("app == 'apache'", False),
    ("absent == ''", False),
    ("empty == ''", True),
    ("app != 'nginx'", False),
    ("app!='apache'", True),
    ("absent != 'x'", True),
    ("has(app)", True),
    ("has(absent)", False),
    ("!has(absent)", True),
    ("! ! has(app)", True),
    ("has(k8s.io/part-of)", True),
    ("k8s.io/part-of == 'shop'", True),
    ("app in {'nginx', 'apache'}", True),
    ("app in {'apache'}", False),
    ("app in {}", False),
    ("absent in {''}", False),
    ("app not in {'apache'}", True),
    ("app not in {'nginx'}", False),
    ("app notin {'apache'}", True),
    ("absent not in {'x'}", True),
    ("app not in {}", True),
    ("app contains 'gin'", True),
    ("app contains 'z'", False),
    ("absent contains ''", False),
    ("app starts with 'ng'", True),
    ("app startswith 'ng'", True),
    ("absent starts with ''", False),
    ("app ends with 'inx'", True),
    ("app endswith 'ng'", False),
    ("app == 'nginx' && tier == 'web'", True),
    ("app == 'nginx' && tier == 'db'", False),
    ("app == 'x' || tier == 'web'", True),
    # && binds closer than ||
    ("app == 'x' && tier == 'web' || has(app)", True),
    ("has(app) || app == 'x' && tier == 'db'", True),
    ("(has(app) || app == 'x') && tier == 'db'", False),
    ("!(app == 'x') && !has(absent)", True),
    # words of the grammar are labels too, where a label stands
    ("in == 'x'", False),
    ("!has(not)", True),
    ("all == 'x'", False),
    ("has == 'x'", False),
]


@pytest.mark.parametrize(("text", "matches"), MATCHES)
def test_a_selector_matches_labels(text: str, matches: bool) -> None:
    assert parse(text).matches(WEB) is matches


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("app == nginx", "column 8: expected a quoted string, found nginx"),
        ("app = 'nginx'", "column 5: unexpected character '='"),
        ("app == 'nginx", "column 8: the string has no end"),
        ("app ==", "column 7: expected a quoted string, found the end"),
        ("app", "column 4: expected ==, !=, in, not in, contains, starts with or ends with, found the end"),
        ("app == 'a' tier == 'b'", "column 12: expected &&, || or the end, found tier"),
        ("(app == 'a'", "column 12: expected ), found the end"),
        ("has(app", "column 8: expected ), found the end"),
        ("app in 'a'", "column 8: expected {, found 'a'"),
        ("app in {'a' 'b'}", "column 13: expected }, found 'b'"),
        ("app not 'a'", "column 5: expected ==, !=, in, not in, contains, starts with or ends with, found not"),
        ("== 'a'", "column 1: expected a label, has(), all(), !, or (, found =="),
        ("&&", "column 1: expected a label, has(), all(), !, or (, found &&"),
        ("has('app')", "column 5: expected a label, found 'app'"),
        ("app == 'a' && ", "column 15: expected a label, has(), all(), !, or (, found the end"),
        ("!" * 100 + "has(a)", "column 65: nested more than 64 deep"),
        ("(" * 5000, "column 65: nested more than 64 deep"),
    ],
)
def test_what_is_no_selector_is_refused_with_the_column(text: str, message: str) -> None:
    with pytest.raises(SelectorError) as refusal:
        parse(text)
    assert str(refusal.value) == message


@given(st.text(max_size=200))
def test_any_text_is_a_selector_or_refused(text: str) -> None:
    try:
        selector = parse(text)
    except SelectorError:
        return
    assert selector.matches({}) in (True, False)


keys = st.sampled_from(["a", "b", "c/d"])
values = st.sampled_from(["", "x", "xy", "yx"])


@given(labels=st.dictionaries(keys, values), key=keys, value=values)
def test_negated_operations_are_the_opposite_of_the_plain_ones(labels: dict[str, str], key: str, value: str) -> None:
    for plain, negated in [
        (f"{key} == '{value}'", f"{key} != '{value}'"),
        (f"{key} in {{'{value}'}}", f"{key} not in {{'{value}'}}"),
    ]:
        assert parse(plain).matches(labels) is not parse(negated).matches(labels)
        assert parse(f"!({plain})").matches(labels) is parse(negated).matches(labels)


@given(labels=st.dictionaries(keys, values), wanted=st.dictionaries(keys, values))
def test_match_labels_says_what_equality_says(labels: dict[str, str], wanted: dict[str, str]) -> None:
    text = " && ".join(f"{key} == '{value}'" for key, value in wanted.items())
    assert LabelSelector(match_labels=wanted).matches(labels) is parse(text).matches(labels)


@pytest.mark.parametrize(
    ("operator", "values", "present", "other", "absent"),
    [
        ("In", ["nginx"], True, False, False),
        ("NotIn", ["nginx"], False, True, True),
        ("Exists", [], True, True, False),
        ("DoesNotExist", [], False, False, True),
    ],
)
def test_match_expressions_are_those_of_kubernetes(
    operator: str, values: list[str], present: bool, other: bool, absent: bool
) -> None:
    selector = LabelSelector.model_validate(
        {"matchExpressions": [{"key": "app", "operator": operator, "values": values}]}
    )
    assert selector.matches({"app": "nginx"}) is present
    assert selector.matches({"app": "apache"}) is other
    assert selector.matches({}) is absent


@pytest.mark.parametrize(
    ("operator", "values"), [("In", []), ("NotIn", []), ("Exists", ["x"]), ("DoesNotExist", ["x"])]
)
def test_match_expressions_with_values_that_do_not_fit_are_refused(operator: str, values: list[str]) -> None:
    with pytest.raises(ValueError, match=f"operator {operator}"):
        LabelSelector.model_validate({"matchExpressions": [{"key": "app", "operator": operator, "values": values}]})
