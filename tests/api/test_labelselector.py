"""Kubernetes' label selectors, and what they share with Calico's grammar; tests/cluster compares them with its own."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from pydantic import ValidationError

from api.labelvalues import LabelValues
from api.object import explain
from api.selector import LabelSelector, Selector, parse

MANY = max(1_500, settings().max_examples)
"""Random label selectors; --hypothesis-profile=soak makes it 100,000."""

KEYS = ["app", "tier", "example.com/part-of"]
VALUES = ["", "a", "b", "c"]


def selector(*expressions: tuple[str, str, list[str]], **labels: str) -> LabelSelector:
    return LabelSelector.model_validate(
        {
            "matchLabels": labels,
            "matchExpressions": [
                {"key": key, "operator": operator, "values": values} for key, operator, values in expressions
            ],
        }
    )


@pytest.mark.parametrize(
    ("operator", "values", "present", "other", "absent"),
    [
        ("In", ["nginx"], True, False, False),
        ("In", ["nginx", "nginx"], True, False, False),
        ("NotIn", ["nginx"], False, True, True),
        ("Exists", [], True, True, False),
        ("DoesNotExist", [], False, False, True),
    ],
)
def test_match_expressions_are_those_of_kubernetes(
    operator: str, values: list[str], present: bool, other: bool, absent: bool
) -> None:
    given = selector(("app", operator, values))
    assert given.matches({"app": "nginx"}) is present
    assert given.matches({"app": "apache"}) is other
    assert given.matches({}) is absent


def test_all_requirements_must_hold_and_none_match_everything() -> None:
    given = selector(("tier", "Exists", []), app="web")
    assert given.matches({"app": "web", "tier": ""})
    assert not given.matches({"app": "web"})
    assert not given.matches({"tier": ""})
    assert LabelSelector().matches({})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"matchExpressions": [{"key": "app", "operator": "In"}]},
            "matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'",
        ),
        (
            {"matchExpressions": [{"key": "app", "operator": "DoesNotExist", "values": ["x"]}]},
            "matchExpressions[0].values: Forbidden: may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
        ),
        (
            {"matchExpressions": [{"key": "a/", "operator": "Exists"}]},
            'matchExpressions[0].key: Invalid value: "a/": name part must be non-empty; name part must consist of '
            "alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character "
            "(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
            "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
        ),
        (
            {"matchLabels": {"app": "x" * 64}},
            f'matchLabels: Invalid value: "{"x" * 64}": must be no more than 63 bytes',
        ),
        (
            {"matchExpressions": [{"key": "app", "operator": "Like"}]},
            "matchExpressions[0].operator: Input should be 'In', 'NotIn', 'Exists' or 'DoesNotExist'",
        ),
    ],
)
def test_what_kubernetes_refuses_is_refused_in_its_words(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        LabelSelector.model_validate(given)
    assert explain(refusal.value) == words


@pytest.mark.parametrize(
    ("most", "field", "made"),
    [
        (64, "matchExpressions", lambda count: [{"key": "app", "operator": "Exists"}] * count),
        (
            256,
            "matchExpressions[0].values",
            lambda count: [{"key": "app", "operator": "NotIn", "values": list(map(str, range(count)))}],
        ),
    ],
)
def test_requirements_and_their_values_are_bounded(
    most: int, field: str, made: Callable[[int], list[dict[str, Any]]]
) -> None:
    LabelSelector.model_validate({"matchExpressions": made(most)})
    with pytest.raises(ValidationError) as refusal:
        LabelSelector.model_validate({"matchExpressions": made(most + 1)})
    assert explain(refusal.value) == f"{field}: Too many: {most + 1}: must have at most {most} items"


SAME: list[tuple[str, LabelSelector]] = [
    ("all()", selector()),
    ("app == 'web'", selector(app="web")),
    ("app in {'web'}", selector(("app", "In", ["web"]))),
    ("tier == 'db' && app == 'web'", selector(app="web", tier="db")),
    ("app in {'web', 'cache'}", selector(("app", "In", ["cache", "web"]))),
    ("app != 'web'", selector(("app", "NotIn", ["web"]))),
    ("app not in {'web', 'cache'}", selector(("app", "NotIn", ["web", "cache"]))),
    ("has(app) && !has(tier)", selector(("tier", "DoesNotExist", []), ("app", "Exists", []))),
    ("!(app == 'web' || !has(tier))", selector(("tier", "Exists", []), ("app", "NotIn", ["web"]))),
    ("app == 'web' && app == 'db'", selector(("app", "In", ["db"]), app="web")),
]


@pytest.mark.parametrize(("text", "same"), SAME)
def test_what_both_kinds_of_selector_can_say_is_equal(text: str, same: LabelSelector) -> None:
    assert parse(text) == same.to_selector()
    back = parse(text).to_label_selector()
    assert back is not None
    assert back.to_selector() == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "app == 'web' || tier == 'db'",
        "app contains 'w'",
        "has(app) && !app starts with 'w'",
        "!all()",
        "app == 'no value of Kubernetes'",
        "has(-no-key-of-kubernetes-)",
        f"has({'a' * 64})",
        " && ".join(f"has(k{number})" for number in range(65)),
        f"app in {{{', '.join(map(repr, map(str, range(257))))}}}",
    ],
)
def test_what_no_label_selector_can_say_is_not_made_one(text: str) -> None:
    assert parse(text).to_label_selector() is None


def any_requirement(dice: random.Random) -> tuple[str, str, list[str]]:
    operator = dice.choice(["In", "NotIn", "Exists", "DoesNotExist"])
    values = dice.choices(VALUES, k=dice.randrange(1, 4)) if operator in ("In", "NotIn") else []
    return dice.choice(KEYS), operator, values


def any_labels(dice: random.Random) -> dict[str, str]:
    return {key: dice.choice(VALUES) for key in KEYS if dice.random() < 0.6}


def test_random_label_selectors_say_the_same_in_both_kinds() -> None:
    for seed in range(MANY):
        dice = random.Random(seed)  # noqa: S311 - the same selectors every time
        given = selector(*(any_requirement(dice) for _ in range(dice.randrange(4))), **any_labels(dice))
        same: Selector = given.to_selector()
        back = same.to_label_selector()
        assert back is not None, seed
        assert back.to_selector() == same == parse(str(same)), seed
        for pod in (any_labels(dice) for _ in range(4)):
            says = given.matches(pod)
            assert same.matches(pod) is says, (seed, pod)
            assert back.matches(pod) is says, (seed, pod)
            assert not says or all(pod.get(key) in given.values_of(key) for key in KEYS), (seed, pod)


def test_a_label_selector_tells_which_values_a_label_can_have() -> None:
    given = selector(("app", "In", ["a", "b"]), ("app", "NotIn", ["b"]), ("tier", "DoesNotExist", []))
    assert given.values_of("app") == LabelValues.only("a")
    assert given.values_of("tier") == LabelValues.only(None)
    assert given.values_of("zone") == LabelValues.other_than()
