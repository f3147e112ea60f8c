"""What a node says of a capture, as it is written and as it is read: from a node that may lie."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from api.capturenode import CaptureNode, NodeCapture

ABOUT: dict[str, Any] = {"namespace": "dev", "name": "web", "uid": "u", "state": "Capturing"}


def read(**said: Any) -> NodeCapture:
    return NodeCapture.read(json.dumps(ABOUT | said))


def test_what_is_written_is_read_again() -> None:
    capture = NodeCapture.model_validate(ABOUT | {"reason": "WriteFailed", "message": 'EIO "x" é', "packets": 2**53})
    assert NodeCapture.read(capture.written()) == capture


def test_what_is_zero_takes_no_room() -> None:
    assert NodeCapture.model_validate(ABOUT).written() == json.dumps(ABOUT, separators=(",", ":"))


@pytest.mark.parametrize(
    "counter", ["pods", "files", "packets", "bytes", "dropped", "seen", "evicted", "interruptions"]
)
@pytest.mark.parametrize("number", [-1, 2**53 + 1, 10**19])
def test_a_number_that_nothing_can_count_is_refused(counter: str, number: int) -> None:
    with pytest.raises(ValidationError, match=counter):
        read(**{counter: number})


@pytest.mark.parametrize("reason", ["Normal\nStarted", "two words", "1st", "Süd", "\x1b[2J", "R" * 129])
def test_a_reason_that_is_no_word_is_refused(reason: str) -> None:
    with pytest.raises(ValidationError, match="reason"):
        read(reason=reason)


def test_a_message_can_not_speak_to_the_terminal() -> None:
    said = read(message="x\n\x1b[31mFAKE\u202e é…")
    assert said.message == "x\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31mFAKE\N{REPLACEMENT CHARACTER} é…"


def test_a_bad_report_hides_no_other() -> None:
    bad = json.dumps(ABOUT | {"uid": "bad", "state": "Paused"})
    node = CaptureNode.model_validate(
        {"metadata": {"name": "n"}, "status": {"reports": [bad, "bad", json.dumps(ABOUT | {"uid": "good"})]}}
    )
    assert node.capture("bad") is None
    good = node.capture("good")
    assert good is not None
    assert good.name == "web"
