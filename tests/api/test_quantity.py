"""Sizes and durations."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.quantity import format_duration, parse_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), (10, 10), ("10", 10), ("10k", 10_000), ("10M", 10_000_000), ("1.5G", 1_500_000_000), ("512Ki", 524_288)],
)
def test_a_quantity_is_bytes(text: object, size: int) -> None:
    assert parse_quantity(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", -1, "1.0001", "10MB", "10 M", "1e3", True, None, 1.5, "9" * 30])
def test_what_is_no_quantity_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("1h", 3600), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800), ("250ms", 0.25), ("0s", 0)],
)
def test_a_duration_is_written_as_go_writes_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1 h", "1w", "1h!", 5, None, "999999999d"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@given(st.integers(0, 10**10))
def test_a_duration_survives_being_written_and_read(milliseconds: int) -> None:
    duration = timedelta(milliseconds=milliseconds)
    assert parse_duration(format_duration(duration)) == duration


def test_a_duration_reads_like_those_of_kubernetes() -> None:
    assert format_duration(timedelta(hours=24)) == "24h0m0s"
    assert format_duration(timedelta(seconds=90)) == "1m30s"
