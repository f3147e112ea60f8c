"""What the server does with a request, over real connections; who the user is and what they may do is made up here."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from apiserver.aggregation.authentication import Authenticated, Authenticator, Connection, Headers, User
from apiserver.aggregation.authorization import Authorizer, forbidden
from apiserver.aggregation.group import Call, Endpoint, Group, Resource, Segment, Subresource
from apiserver.aggregation.metrics import Metrics
from apiserver.aggregation.requestinfo import RequestInfo
from apiserver.aggregation.server import Server
from kube.connections import Limits
from kube.serve import listening
from kube.status import unauthorized

PATIENCE = 20.0
SOON = 0.5
ROOT = "/apis/library.example.org/v1"
PAGES = f"{ROOT}/namespaces/dev/books/poems/pages"
ACCESS = "apiserver.aggregation.server.access"
PAGE = bytes(range(256)) * 256
HELD = "13"


class Named(Authenticator):
    """Whoever names themselves in X-Remote-User."""

    def __init__(self) -> None:
        pass

    def check(self) -> str | None:
        return None

    async def authenticate(self, headers: Headers, connection: Connection | None) -> Authenticated:  # noqa: ARG002 - as the real one
        if "X-Remote-User" not in headers:
            raise unauthorized()
        return Authenticated(user=User(name=headers["X-Remote-User"]))


class Lenient(Authorizer):
    """Everyone may everything but eve, who may nothing."""

    def __init__(self) -> None:
        pass

    def check(self) -> str | None:
        return None

    async def authorize(self, user: User, info: RequestInfo) -> None:
        if user.name == "eve":
            raise forbidden(user, info)


@dataclass
class Library:
    """Serves pages; reading may be held up, or break off."""

    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    started: int = 0
    ended: int = 0
    length: int = 2 * len(PAGE)
    failure: Exception | None = None

    async def list_pages(self, call: Call) -> web.StreamResponse:
        if call.info.query.get("slow"):
            await self.go_on.wait()
        return web.json_response({"items": []})

    async def read_page(self, call: Call) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = self.length
        await response.prepare(call.request)
        self.started += 1
        try:
            await response.write(PAGE)
            if self.failure is not None:
                raise self.failure
            if call.segments["page"] == HELD:
                await self.go_on.wait()
            for _ in range(self.length // len(PAGE) - 1):
                await response.write(PAGE)
        finally:
            self.ended += 1
        return response

    def group(self) -> Group:
        page = Segment(name="page", description="page", problem=lambda value: None if value.isdigit() else "no number")
        pages = Subresource(
            name="pages",
            kind="PageList",
            endpoints=(
                Endpoint(verb="get", handle=self.list_pages, description="list pages", answers="PageList"),
                Endpoint(verb="get", handle=self.read_page, description="read", segments=(page,), streams=True),
            ),
        )
        books = Resource(name="books", singular="book", kind="Book", subresources=(pages,))
        return Group(name="library.example.org", version="v1", resources=(books,))


@dataclass
class World:
    library: Library
    server: Server
    session: aiohttp.ClientSession
    metrics: Metrics
    port: int
    losses: Counter[str] = field(default_factory=Counter)

    def get(self, path: str, *, user: str = "alice", method: str = "GET", **options: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}"
        headers = {"X-Remote-User": user} | options.pop("headers", {})
        return self.session.request(method, url, headers=headers, **options)

    async def code(self, path: str, **options: Any) -> int:
        async with self.get(path, **options) as response:
            await response.read()
            return int(response.status)

    async def say(self, text: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16)
        writer.write(text.encode())
        return reader, writer

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """The values of a metric by its labels, those without a value left out."""
        families = text_string_to_metric_families(self.metrics.exposition().decode())
        return {
            tuple(value for _, value in sorted(sample.labels.items()) if value): sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }


@asynccontextmanager
async def serving(*, streams_per_user: int = 2, request_seconds: float = 60.0, **options: Any) -> AsyncIterator[World]:
    library, metrics = Library(), Metrics()
    server = Server(
        groups=[library.group()],
        schemas={"PageList": {"type": "object"}},
        title="library",
        version="v1",
        authenticator=Named(),
        authorizer=Lenient(),
        checks={},
        metrics=metrics,
        streams_per_user=streams_per_user,
        request_seconds=request_seconds,
    )
    async with (
        listening(
            server.application(),
            port=0,
            host="127.0.0.1",
            on_drain=server.drain,
            on_loss=metrics.lost,
            cancels_abandoned=True,
            **{"grace": PATIENCE} | options,
        ) as port,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
    ):
        yield World(library, server, session, metrics, port)


async def eventually(question: Any) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (answer := question()):  # noqa: ASYNC110 - what is waited for is told by a socket
            await asyncio.sleep(0.01)
    return answer


def logged(caplog: pytest.LogCaptureFixture, *names: str) -> list[dict[str, Any]]:
    """Fields of the access log's lines."""
    records = [record for record in caplog.records if record.name == ACCESS]
    return [{name: vars(record)[name] for name in names} for record in records]


@pytest.fixture(autouse=True)
def _access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=ACCESS)


async def test_a_line_is_logged_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as world:
        await world.code(f"{PAGES}/7", headers={"Audit-ID": "a-1"})
        await world.code(PAGES, user="eve", headers={"Audit-ID": "a-2"})
        await world.code("/apis", headers={"Audit-ID": "a-3"})
        await world.code("/apis//", headers={"Audit-ID": "a-4"})
    book = {
        "group": "library.example.org",
        "resource": "books",
        "subresource": "pages",
        "namespace": "dev",
        "name": "poems",
    }
    lines = logged(caplog, "audit_id", "user", "verb", "object", "code", "cut", "remote")
    assert [tuple(line.values()) for line in lines] == [
        ("a-1", "alice", "get", book, 200, None, "127.0.0.1"),
        ("a-2", "eve", "get", book, 403, None, "127.0.0.1"),
        ("a-3", "alice", "get", None, 200, None, "127.0.0.1"),
        ("a-4", None, None, None, 400, None, "127.0.0.1"),
    ]
    assert [line["seconds"] >= 0 for line in logged(caplog, "seconds")] == [True] * 4


async def test_the_bytes_that_are_logged_and_measured_are_those_of_the_body(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as world:
        world.library.length = 3 * len(PAGE)
        for method in ("GET", "HEAD"):
            await world.code(PAGES, method=method)
        await world.code(f"{PAGES}/7")
        sizes = world.samples("apiserver_response_sizes_sum")
    listed = len(json.dumps({"items": []}))
    assert [line["bytes"] for line in logged(caplog, "bytes")] == [listed, 0, 3 * len(PAGE)]
    assert list(sizes.values()) == [listed + 3 * len(PAGE)]


async def test_health_is_not_logged_and_a_long_path_only_begun(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as world:
        assert await world.code("/healthz") == 200
        assert await world.code(f"/{'x' * 5000}") == 404
    (record,) = (record for record in caplog.records if record.name == ACCESS)
    assert len(record.getMessage()) < 1100


async def test_an_answer_that_a_client_leaves_is_logged_as_cut(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as world:
        world.library.length = 1 << 30
        async with world.get(f"{PAGES}/7") as response:
            await response.content.readexactly(1000)
        await eventually(lambda: logged(caplog, "cut"))
        aborts = world.samples("apiserver_request_aborts_total")
    (line,) = logged(caplog, "code", "bytes", "cut")
    assert (line["code"], line["cut"]) == (200, "client")
    assert 1000 <= line["bytes"] < 1 << 30
    assert aborts == {}


async def test_a_request_that_a_client_leaves_is_cancelled_and_is_not_our_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as world:
        _, writer = await world.say(f"GET {PAGES}?slow=1 HTTP/1.1\r\nHost: test\r\nX-Remote-User: alice\r\n\r\n")
        await eventually(lambda: world.samples("apiserver_current_inflight_requests").get(("readOnly",)))
        writer.transport.abort()
        await eventually(lambda: logged(caplog, "cut"))
        assert world.samples("apiserver_request_aborts_total") == {}
        assert world.samples("apiserver_current_inflight_requests")["readOnly",] == 0
    assert logged(caplog, "code", "cut") == [{"code": 0, "cut": "client"}]


async def test_an_answer_that_breaks_off_looks_broken_and_is_logged_as_cut(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as world:
        world.library.length = 2 * len(PAGE)
        world.library.failure = RuntimeError("torn out")
        with pytest.raises(aiohttp.ClientError):
            await world.code(f"{PAGES}/7")
        await eventually(lambda: logged(caplog, "cut"))
        aborts = world.samples("apiserver_request_aborts_total")
    assert logged(caplog, "code", "bytes", "cut") == [{"code": 200, "bytes": len(PAGE), "cut": "server"}]
    assert list(aborts.values()) == [1]


async def test_a_client_that_does_not_read_is_cut_off_while_others_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(limits=Limits(stall=SOON)) as world:
        world.library.length = 1 << 30
        _, writer = await world.say(f"GET {PAGES}/7 HTTP/1.1\r\nHost: test\r\nX-Remote-User: alice\r\n\r\n")
        await eventually(lambda: world.library.started)
        assert await world.code(PAGES) == 200
        await eventually(lambda: world.library.ended)
        await eventually(lambda: len(logged(caplog, "cut")) == 2)
        aborts = world.samples("apiserver_request_aborts_total")
        writer.transport.abort()
    line = logged(caplog, "cut", "bytes")[1]
    assert line["cut"] == "stalled client"
    assert line["bytes"] < 20_000_000  # what two sockets' buffers hold, of a gigabyte
    assert list(aborts.values()) == [1]


async def test_a_request_that_takes_too_long_is_answered_with_a_timeout_while_others_are_served() -> None:
    async with serving(request_seconds=SOON) as world, asyncio.TaskGroup() as tasks:
        slow = world.get(f"{PAGES}?slow=1")
        waiting = tasks.create_task(slow.__aenter__(), name="slow request")
        assert await world.code(PAGES) == 200
        response = await waiting
        status = await response.json()
        terminated = world.samples("apiserver_request_terminations_total")
    assert (response.status, status["reason"], status["code"]) == (504, "Timeout", 504)
    assert status["message"] == "Timeout: request did not complete within the allotted timeout"
    assert terminated == {("504", "apiserver", "library.example.org", "books", "resource", "pages", "GET", "v1"): 1}


async def test_a_download_may_take_longer_than_other_requests() -> None:
    async with serving(request_seconds=SOON) as world:
        async with world.get(f"{PAGES}/{HELD}") as response:
            assert world.samples("apiserver_longrunning_requests") == {
                ("apiserver", "library.example.org", "books", "resource", "pages", "GET", "v1"): 1
            }
            assert world.samples("apiserver_current_inflight_requests")["readOnly",] == 0
            await asyncio.sleep(SOON * 3)
            world.library.go_on.set()
            assert await response.read() == PAGE * 2
        await eventually(lambda: list(world.samples("apiserver_longrunning_requests").values()) == [0])


async def test_a_user_with_many_downloads_is_told_to_wait_while_others_are_served() -> None:
    async with serving(streams_per_user=2) as world:
        async with world.get(f"{PAGES}/{HELD}"), world.get(f"{PAGES}/{HELD}"):
            async with world.get(f"{PAGES}/7") as response:
                status = await response.json()
                assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert await world.code(PAGES) == 200
            assert await world.code(f"{PAGES}/7", user="bob") == 200
            terminated = world.samples("apiserver_request_terminations_total")
            world.library.go_on.set()
        assert status["reason"] == "TooManyRequests"
        assert [labels[0] for labels in terminated] == ["429"]


@pytest.mark.parametrize(
    ("method", "path", "code", "reason"),
    [
        ("POST", PAGES, 405, "MethodNotAllowed"),
        ("PUT", f"{PAGES}/7", 405, "MethodNotAllowed"),
        ("PATCH", PAGES, 405, "MethodNotAllowed"),
        ("DELETE", PAGES, 405, "MethodNotAllowed"),
        ("OPTIONS", PAGES, 405, "MethodNotAllowed"),
        ("TRACE", PAGES, 405, "MethodNotAllowed"),
        ("POST", "/apis", 405, "MethodNotAllowed"),
        ("DELETE", "/metrics", 405, "MethodNotAllowed"),
        ("GET", f"{PAGES}/cover", 400, "BadRequest"),
        ("GET", f"{ROOT}/namespaces/dev/pens/p/pages", 404, "NotFound"),
        ("GET", "/nothing", 404, "NotFound"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_a_status(method: str, path: str, code: int, reason: str) -> None:
    async with serving() as world, world.get(path, method=method) as response:
        status = await response.json()
        assert (response.status, status["kind"], status["reason"], status["code"]) == (code, "Status", reason, code)
        assert not {"Server", "Retry-After"} & response.headers.keys()


async def test_head_gets_the_head_of_the_answer_alone() -> None:
    async with serving() as world:
        for path in (PAGES, "/apis", "/openapi/v2", "/metrics", "/nothing"):
            async with world.get(path) as whole, world.get(path, method="HEAD") as head:
                assert (head.status, head.headers["Content-Type"]) == (whole.status, whole.headers["Content-Type"])
                assert await head.read() == b""


async def test_a_body_is_not_read_and_ends_the_connection() -> None:
    async with serving() as world:
        head = f"POST {PAGES} HTTP/1.1\r\nHost: test\r\nX-Remote-User: alice\r\nContent-Length: 1000000000\r\n"
        reader, writer = await world.say(head + "Expect: 100-continue\r\n\r\n")
        async with asyncio.timeout(PATIENCE):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 405 ")
            assert b"Connection: close" in answer
            assert b"100 Continue" not in answer
            with suppress(ConnectionError):
                for _ in range(1000):
                    writer.write(bytes(1_000_000))
                    await writer.drain()
                raise AssertionError("a gigabyte was taken")
        assert world.samples("aggregation_lost_connections_total") == {("size",): 1}
        assert await world.code(PAGES) == 200
        writer.transport.abort()


async def test_metrics_are_for_those_who_may_read_them() -> None:
    async with serving() as world:
        assert await world.code("/metrics", user="eve") == 403
        async with world.session.get(f"http://127.0.0.1:{world.port}/metrics") as response:
            assert response.status == 401
        async with world.get("/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            shown = await response.text()
        denied = 'authorization_duration_seconds_count{result="denied"} 1.0'
        failed = 'authentication_duration_seconds_count{result="failure"} 1.0'
        assert denied in shown
        assert failed in shown


async def test_readiness_fails_first_and_a_download_under_way_ends_whole(caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        session = await stack.enter_async_context(aiohttp.ClientSession())  # that of the world is closed before
        async with serving(drain=SOON) as world:
            world.session = session
            download = await stack.enter_async_context(world.get(f"{PAGES}/{HELD}"))
            assert await world.code("/readyz") == 200

            async def ask_while_draining() -> list[object]:
                async with asyncio.timeout(PATIENCE):
                    while await world.code("/readyz") == 200:
                        pass
                async with world.get(PAGES) as response:
                    answers = [response.status, response.headers["Connection"], await world.code("/livez")]
                world.library.go_on.set()
                return answers

            asking = tasks.create_task(ask_while_draining(), name="asking")
        assert await asking == [200, "close", 200]
        assert await download.read() == PAGE * 2
    assert logged(caplog, "cut", "code")[-1] == {"cut": None, "code": 200}
