"""When captures go by themselves."""

from datetime import datetime
from typing import Any

import pytest

from controller.expiry import goes_at
from controller.quota import admit
from tests.controller.cases import START, after, capture


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"ttlSecondsAfterFinished": 60}, after(hours=1, minutes=1)),
        ({"ttlSecondsAfterFinished": 0}, after(hours=1)),
        ({"ttlSecondsAfterFinished": 60, "endTime": "2030-01-01T00:10:00Z"}, after(minutes=11)),
        ({"ttlSecondsAfterFinished": 60, "startTime": "2030-01-01T02:00:00Z"}, after(hours=3, minutes=1)),
        ({"ttlSecondsAfterFinished": 60, "suspend": True}, after(hours=1, minutes=1)),
        ({"ttlSecondsAfterFinished": 60, "policy": None}, None),
    ],
    ids=["no ttl", "longest duration", "at once", "end time", "start time", "suspended", "never begun"],
)
def test_a_capture_goes_its_ttl_after_its_end(given: dict[str, Any], expected: datetime | None) -> None:
    one = capture("web", **given)
    (admission,) = admit([one], already=(), now=START).values()
    assert goes_at(one, admission) == expected
