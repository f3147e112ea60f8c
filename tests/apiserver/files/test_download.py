import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiserver.files.download import named, piece, refusal
from kube.status import StatusError


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ({}, {}),
        ({"uid": ["x"]}, {}),
        ({"offset": ["0"]}, {"offset": "0"}),
        ({"offset": ["10"], "limit": ["20"]}, {"offset": "10", "limit": "20"}),
        ({"offset": ["10", "99"]}, {"offset": "10"}),
    ],
)
def test_offset_and_limit_are_passed_on(query: dict[str, list[str]], part: dict[str, str]) -> None:
    assert piece(query, has_range=False) == part


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.5", "1k", "٣", "9" * 19, " 1"])
@pytest.mark.parametrize("name", ["offset", "limit"])
def test_what_is_no_number_of_bytes_is_refused(name: str, value: str) -> None:
    with pytest.raises(StatusError, match=f"{name} must be a number of bytes") as refused:
        piece({name: [value]}, has_range=False)
    assert refused.value.code == 400


def test_a_part_is_asked_for_in_one_way() -> None:
    assert piece({}, has_range=True) == {}
    with pytest.raises(StatusError, match="not both"):
        piece({"limit": ["1"]}, has_range=True)


@given(st.dictionaries(st.sampled_from(["offset", "limit", "uid"]), st.lists(st.text(), min_size=1)))
def test_any_query_is_passed_on_as_digits_or_refused(query: dict[str, list[str]]) -> None:
    try:
        part = piece(query, has_range=False)
    except StatusError:
        return
    assert all(value.isdigit() and value.isascii() for value in part.values())


@pytest.mark.parametrize(
    ("status", "code"), [(400, 400), (412, 412), (416, 416), (429, 429), (401, 503), (403, 503), (500, 503), (302, 503)]
)
def test_a_client_is_told_of_its_own_faults_only(status: int, code: int) -> None:
    body = json.dumps({"kind": "Status", "message": "the reason"}).encode()

    said = refusal("n1", status, body)

    assert said.code == code
    assert "the reason" in said.message
    assert ("node n1" in said.message) is (code == 503)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "none"),
        (["a"], "a"),
        (["a", "b", "c", "d", "e"], "a, b, c, d, e"),
        (["a", "b", "c", "d", "e", "f", "g"], "a, b, c, d, e and 2 more"),
    ],
)
def test_a_message_names_no_more_than_can_be_read(names: list[str], text: str) -> None:
    assert named(names) == text
