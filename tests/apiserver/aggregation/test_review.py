import asyncio
import errno
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from apiserver.aggregation.review import Reviewer, ReviewError, is_transient
from kube.client import SUBJECTACCESSREVIEWS, Client, Json
from kube.status import StatusError


def caused(code: int, cause: BaseException) -> StatusError:
    """As the client tells of a connection."""
    error = StatusError(code, "no connection")
    error.__cause__ = cause
    return error


BROKEN = caused(503, aiohttp.ClientOSError(errno.ECONNRESET, "reset"))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (StatusError(500, "x"), True),
        (StatusError(504, "x"), True),
        (StatusError(429, "x"), True),
        (StatusError(429, "x", retry_after=1), True),
        (StatusError(503, "x"), False),
        (StatusError(503, "x", retry_after=1), True),
        (StatusError(500, "x", reason="ServerTimeout"), False),
        (StatusError(500, "x", reason="ServerTimeout", details={"retryAfterSeconds": 0}), True),
        (StatusError(500, "x", reason=""), True),
        (StatusError(403, "x", reason=""), False),
        (StatusError(400, "x"), False),
        (StatusError(401, "x"), False),
        (StatusError(403, "x"), False),
        (StatusError(422, "x"), False),
        (BROKEN, True),
        (caused(503, aiohttp.ServerDisconnectedError()), True),
        (caused(503, ConnectionResetError()), True),
        (caused(503, aiohttp.ClientOSError(errno.ECONNREFUSED, "refused")), False),
        (caused(503, aiohttp.ClientConnectionError()), False),
        (caused(503, ValueError()), False),
        (caused(504, TimeoutError()), False),
    ],
)
def test_a_review_is_tried_again_where_kubernetes_does_so(error: StatusError, transient: bool) -> None:
    assert is_transient(error) is transient


class Script(Client):
    """Answers as it is told, the last way for ever."""

    def __init__(self, *answers: Json | StatusError) -> None:
        self.asked = 0
        self._answers = list(answers)

    async def create(self, *_: Any, **__: Any) -> Json:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, StatusError):
            raise answer
        return answer


class Pauses(list[float]):
    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


ALLOWED: Json = {"status": {"allowed": True}}


async def test_what_passes_is_tried_again_until_it_has_passed() -> None:
    client, pauses = Script(StatusError(500, "x"), BROKEN, StatusError(429, "x", retry_after=3), ALLOWED), Pauses()

    assert await Reviewer(client, SUBJECTACCESSREVIEWS, sleep=pauses).status({}) == {"allowed": True}

    first, second, third = pauses
    assert 0.5 <= first <= 0.6
    assert 0.75 <= second <= 0.9
    assert third == 3, "what the server asks for"


async def test_five_tries_are_all() -> None:
    client, pauses = Script(StatusError(500, "out of order")), Pauses()

    with pytest.raises(ReviewError, match="out of order") as raised:
        await Reviewer(client, SUBJECTACCESSREVIEWS, sleep=pauses).status({})

    assert (client.asked, len(pauses)) == (5, 4)
    assert not raised.value.of_one


@pytest.mark.parametrize(("code", "of_one"), [(400, True), (413, True), (422, True), (401, False), (403, False)])
async def test_what_does_not_pass_is_asked_once(code: int, of_one: bool) -> None:
    client = Script(StatusError(code, "no"))

    with pytest.raises(ReviewError) as raised:
        await Reviewer(client, SUBJECTACCESSREVIEWS).status({})

    assert client.asked == 1
    assert raised.value.of_one is of_one


@pytest.mark.parametrize("answer", [{}, {"status": None}, {"status": []}, {"status": "allowed"}])
async def test_an_answer_without_a_status_is_none(answer: Json) -> None:
    with pytest.raises(ReviewError, match="without a status"):
        await Reviewer(Script(answer), SUBJECTACCESSREVIEWS).status({})


@asynccontextmanager
async def closing_first(connections: int, kubeconfig: Path) -> AsyncIterator[Callable[[], int]]:
    """A kube-apiserver that reads a request and hangs up, so many times, before it answers; yields how many came."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await reader.readuntil(b"\r\n\r\n")
        if count > connections:
            body = json.dumps(ALLOWED).encode()
            writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        yield lambda: count


def write_kubeconfig(path: Path, url: str) -> None:
    named = {"name": "x", "cluster": {"server": url}, "user": {}, "context": {"cluster": "x", "user": "x"}}
    kinds = {kind: [named] for kind in ("clusters", "users", "contexts")}
    path.write_text(json.dumps({"current-context": "x", **kinds}))


async def test_a_connection_that_kube_apiserver_closes_fails_no_review(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    async with (
        closing_first(2, kubeconfig) as connections,
        Client.connect(user_agent="test", kubeconfig=kubeconfig) as client,
    ):
        reviewer = Reviewer(client, SUBJECTACCESSREVIEWS, sleep=Pauses())

        assert await reviewer.status({"user": "alice"}) == {"allowed": True}
        assert connections() == 3


async def test_each_try_is_told_by_the_code_of_its_answer() -> None:
    codes: list[str] = []
    client = Script(StatusError(429, "x", retry_after=3), BROKEN, ALLOWED)

    def observe(code: str, seconds: float) -> None:
        assert seconds >= 0
        codes.append(code)

    await Reviewer(client, SUBJECTACCESSREVIEWS, sleep=Pauses(), observe=observe).status({})

    assert codes == ["429", "<error>", "201"]
