"""How it is told what is wrong with an object."""

from typing import Any

import pytest
from pydantic import ValidationError

from api.object import explain
from api.selector import LabelSelector


def told(given: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as refusal:
        LabelSelector.model_validate(given)
    return explain(refusal.value)


def test_a_message_that_quotes_what_was_given_is_cut() -> None:
    cut = 'Invalid value: "'.ljust(500, "x")
    assert told({"matchLabels": {"app": "x" * 200_000}}) == f"matchLabels: {cut}…"


def test_a_path_through_a_long_key_is_cut_and_the_message_still_told() -> None:
    path = f"matchLabels.{'k' * 488}…"
    assert told({"matchLabels": {"k" * 200_000: 1}}) == f"{path}: Input should be a valid string"


def test_of_many_problems_the_first_ten_are_told_and_the_rest_counted() -> None:
    lines = told({"matchExpressions": [{"key": "x" * 4000, "operator": "Exists"}] * 12}).split("; and ")
    assert lines[-1] == "2 more problems"
    assert len(lines[0]) < 10 * 550
