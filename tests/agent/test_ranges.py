"""Parts of files (RFC 9110, section 14)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.ranges import Part, UnsatisfiableError, part


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", Part(0, 10, partial=True)),
        ("bytes=10-", Part(10, 100, partial=True)),
        ("bytes=90-1000", Part(90, 100, partial=True)),
        ("bytes=-10", Part(90, 100, partial=True)),
        ("bytes=-1000", Part(0, 100, partial=True)),
        ("bytes=99-99", Part(99, 100, partial=True)),
        # not one range of bytes: as if it were not there
        ("bytes=9-0", Part(0, 100)),
        ("bytes=0-1,5-6", Part(0, 100)),
        ("bytes=a-b", Part(0, 100)),
        ("lines=1-2", Part(0, 100)),
        ("", Part(0, 100)),
    ],
)
def test_a_range_header(header: str, expected: Part) -> None:
    assert part(100, header=header) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(header: str) -> None:
    with pytest.raises(UnsatisfiableError):
        part(100, header=header)


@pytest.mark.parametrize(
    ("offset", "limit", "expected"),
    [
        (None, None, Part(0, 100)),
        ("10", None, Part(10, 100)),
        ("10", "20", Part(10, 30)),
        ("90", "20", Part(90, 100)),
        ("100", None, Part(100, 100)),
        (None, "0", Part(0, 0)),
    ],
)
def test_offset_and_limit(offset: str | None, limit: str | None, expected: Part) -> None:
    assert part(100, offset=offset, limit=limit) == expected


@pytest.mark.parametrize(("offset", "limit"), [("101", None), ("-1", None), ("x", None), (None, "1e3"), ("", None)])
def test_a_bad_offset_or_limit_is_refused(offset: str | None, limit: str | None) -> None:
    with pytest.raises(UnsatisfiableError):
        part(100, offset=offset, limit=limit)


@given(size=st.integers(0, 10**6), header=st.text(max_size=30), offset=st.text(max_size=8), limit=st.text(max_size=8))
def test_a_part_never_leaves_the_file(size: int, header: str, offset: str, limit: str) -> None:
    try:
        found = part(size, header=header, offset=offset, limit=limit)
    except UnsatisfiableError:
        return
    assert 0 <= found.start <= found.end <= size
