"""The webhook over HTTP: nobody is answered at another path, and nothing that is sent is answered with a traceback."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import aiohttp
import pytest
from pydantic import ValidationError

from kube.serve import listening
from tests.webhook.test_review import review
from webhook.admission import Admission
from webhook.review import Answer, Request
from webhook.server import LIMITS, application, read_path

PATH = "0123456789abcdef"


class AllowAll:
    async def stamp(self, _: Request) -> Answer:
        return Answer()

    async def judge(self, _: Request) -> Answer:
        return Answer(audit={"rule": "allowed"})


@asynccontextmanager
async def served() -> AsyncIterator[aiohttp.ClientSession]:
    app = application(cast("Admission", AllowAll()), paths=lambda: frozenset({PATH}))
    async with (
        listening(app, port=0, host="127.0.0.1", grace=0, limits=LIMITS) as port,
        aiohttp.ClientSession(base_url=f"http://127.0.0.1:{port}") as session,
    ):
        yield session


@pytest.mark.parametrize("half", ["stamp", "judge"])
async def test_a_review_is_answered(half: str) -> None:
    async with served() as session, session.post(f"/{half}/{PATH}", data=review()) as answer:
        assert answer.status == 200
        body = await answer.json()
    assert body["kind"] == "AdmissionReview"
    assert body["response"]["uid"] == "u-1"
    assert body["response"]["allowed"] is True


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", f"/judge/{PATH}x", review(), 404),
        ("POST", "/judge/" + "ä" * 8, review(), 404),
        ("POST", "/judge", review(), 404),
        ("POST", f"/other/{PATH}", review(), 404),
        ("GET", f"/judge/{PATH}", None, 405),
        ("POST", f"/judge/{PATH}", b"{", 400),
        ("POST", f"/judge/{PATH}", review(resource={"version": "v1", "resource": "pods"}), 400),
        ("POST", f"/judge/{PATH}", b"[" * 3 * 2**20, 400),
        ("POST", f"/judge/{PATH}", b" " * 9 * 2**20, 413),
    ],
    ids=["wrong path", "no ASCII", "no path", "other", "GET", "malformed", "kind", "3 MiB of brackets", "too large"],
)
async def test_what_is_no_review_gets_a_clean_error(method: str, path: str, body: bytes | None, code: int) -> None:
    async with served() as session, session.request(method, path, data=io.BytesIO(body or b"")) as answer:
        assert answer.status == code
        status = json.loads(await answer.read())
    assert (status["kind"], status["status"], status["code"]) == ("Status", "Failure", code)
    assert "Traceback" not in json.dumps(status)


@pytest.mark.parametrize("data", [{}, {"path": ""}, {"path": "c2hvcnQ="}, {"path": "%%%"}, {"path": "/w=="}])
def test_a_secret_without_a_path_is_refused(data: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"path|padding|decode|base64") as refusal:
        read_path({"data": data})
    assert not isinstance(refusal.value, ValidationError)


def test_the_path_is_read() -> None:
    assert read_path({"data": {"path": "MDEyMzQ1Njc4OWFiY2RlZg=="}}) == PATH
