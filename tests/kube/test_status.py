"""`metav1.Status`, read and written."""

import json

import pytest

from kube import status
from kube.status import StatusError


def test_a_status_survives_being_written_and_read() -> None:
    given = status.too_many_requests("slowly", retry_after=3)
    read = StatusError.parse(429, json.dumps(given.to_json()).encode())
    assert (read.code, read.reason, read.message, read.retry_after) == (429, "TooManyRequests", "slowly", 3)


def test_not_found_reads_as_that_of_kubernetes() -> None:
    error = status.not_found("packetcaptures.kubepcap.io", "x")
    assert error.to_json() == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": 'packetcaptures.kubepcap.io "x" not found',
        "reason": "NotFound",
        "code": 404,
        "details": {"name": "x", "kind": "packetcaptures"},
    }


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (502, b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (503, b"", "Service Unavailable"),
        (500, b"[]", "[]"),
        (403, b'{"kind": "Status", "details": 3}', "Forbidden"),
        (599, b"", "HTTP status 599"),
        (500, b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_an_answer_that_is_no_status_keeps_its_code_and_first_words(code: int, body: bytes, message: str) -> None:
    error = StatusError.parse(code, body)
    assert (error.code, error.message) == (code, message)
