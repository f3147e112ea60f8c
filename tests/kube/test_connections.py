"""What a client may take, on real sockets: each limit refuses who is over it, and others are served meanwhile."""

import asyncio
import json
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from hack.clusters.pki import Authority, Pair
from kube.certificates import KeyPair, ServerTLS, client_context
from kube.connections import Limits
from kube.serve import listening

PATIENCE = 20.0
# Long enough for a busy machine to serve a request in, short enough to wait for.
SOON = 0.5
ANSWER = b"whole"
CHUNK = bytes(1 << 16)


@dataclass
class Client:
    """A connection that sends what it is told to, byte for byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, path: str = "/") -> bytes:
        """The body of an answer."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        return await self.answer()

    async def answer(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            return await self.reader.readexactly(int(length.split(b":")[1]))

    async def rest(self) -> bytes:
        """What comes until the connection is closed, however that is done."""
        got = b""
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionError, ssl.SSLError):
                while piece := await self.reader.read(1 << 16):
                    got += piece
        return got


@dataclass
class World:
    port: int
    losses: Counter[str]
    clients: list[Client] = field(default_factory=list)
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0
    cancelled: int = 0
    streamed: int = 0
    most_held: int = 0
    broken: list[Exception] = field(default_factory=list)

    async def connect(self, tls: ssl.SSLContext | None = None) -> Client:
        name = "localhost" if tls else None
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name))
        self.clients.append(client)
        return client

    async def is_served(self) -> bool:
        return await (await self.connect()).ask() == ANSWER

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(body=ANSWER)

    async def hold_on(self, _: web.Request) -> web.Response:
        self.held += 1
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return web.Response(body=ANSWER)

    async def read(self, request: web.Request) -> web.Response:
        return web.Response(body=str(len(await request.read())).encode())

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = int(request.query["bytes"])
        await response.prepare(request)
        try:
            while self.streamed < response.content_length:
                await response.write(CHUNK)
                self.streamed += len(CHUNK)
                if request.transport is not None:
                    self.most_held = max(self.most_held, request.transport.get_write_buffer_size())
        except ConnectionError as error:
            self.broken.append(error)
            raise
        return response


@asynccontextmanager
async def serving(
    limits: Limits, *, tls: ServerTLS | None = None, grace: float = 0.0, cancels_abandoned: bool = False
) -> AsyncIterator[World]:
    world = World(0, Counter())
    app = web.Application(client_max_size=1 << 30)
    app.add_routes(
        [
            web.route("*", "/", world.answer),
            web.get("/hold", world.hold_on),
            web.get("/stream", world.stream),
            web.post("/read", world.read),
        ]
    )

    def lose(loss: str) -> None:
        world.losses[loss] += 1

    async with listening(
        app,
        port=0,
        host="127.0.0.1",
        tls=tls,
        grace=grace,
        limits=limits,
        on_loss=lose,
        cancels_abandoned=cancels_abandoned,
    ) as port:
        world.port = port
        try:
            yield world
        finally:
            for client in world.clients:
                client.writer.transport.abort()


async def eventually(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not question():  # noqa: ASYNC110 - what is waited for is told by a socket
            await asyncio.sleep(0.01)


async def trickle(client: Client, head: bytes) -> None:
    """Send byte by byte until the other side has had enough."""
    with suppress(ConnectionError):
        for byte in head:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.05)


async def test_a_head_that_comes_byte_by_byte_is_cut_off_while_others_are_served() -> None:
    async with serving(Limits(head=SOON)) as world, asyncio.TaskGroup() as tasks:
        slow = await world.connect()
        sending = tasks.create_task(trickle(slow, b"GET / HTTP/1.1\r\nX: " + b"x" * 10_000), name="trickle")
        assert await world.is_served()
        assert await slow.rest() == b""
        assert await world.is_served()
        sending.cancel()
        assert world.losses == {"head": 1}


async def test_the_head_of_a_later_request_has_its_time_too() -> None:
    async with serving(Limits(head=SOON, idle=PATIENCE * 2)) as world:
        client = await world.connect()
        assert await client.ask() == ANSWER
        client.writer.write(b"GET / HT")
        assert await client.rest() == b""
        assert world.losses == {"head": 1}


async def test_a_connection_that_asks_for_nothing_is_closed() -> None:
    async with serving(Limits(head=SOON)) as world:
        silent = await world.connect()
        assert await silent.rest() == b""
        assert await world.is_served()


async def test_a_kept_connection_is_used_again_and_closed_once_it_is_idle() -> None:
    async with serving(Limits(head=PATIENCE * 2, idle=SOON)) as world:
        client = await world.connect()
        assert [await client.ask() for _ in range(3)] == [ANSWER] * 3
        assert await client.rest() == b""
        assert world.losses == {"idle": 1}


async def test_a_request_may_take_longer_to_answer_than_a_connection_may_be_idle() -> None:
    async with serving(Limits(head=SOON, idle=SOON)) as world:
        client = await world.connect()
        client.writer.write(b"GET /hold HTTP/1.1\r\nHost: test\r\n\r\n")
        await asyncio.sleep(SOON * 3)
        world.hold.set()
        assert await client.answer() == ANSWER


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["unfinished", "whole"])
async def test_a_head_that_is_too_large_is_refused(end: bytes) -> None:
    async with serving(Limits(head_bytes=1 << 20)) as world:
        client = await world.connect()
        assert await client.ask() == ANSWER
        client.writer.write(b"GET / HTTP/1.1\r\nHost: test" + b"\r\nX: %s" % (b"x" * 1000) * 2000 + end)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 431
        assert world.losses == {"size": 1}
        assert await world.is_served()


@pytest.mark.parametrize("size", [70_000, 200_000])
async def test_a_head_that_comes_whole_at_once_is_not_larger_than_it_may_be(size: int) -> None:
    async with serving(Limits()) as world:
        client = await world.connect()
        client.writer.write(
            b"GET / HTTP/1.1\r\nHost: test" + b"\r\nX: %s" % (b"x" * 1000) * (size // 1000) + b"\r\n\r\n"
        )
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 431
        assert world.losses == {"size": 1}


@pytest.mark.parametrize("end", [b"", b" HTTP/1.1\r\nHost: test\r\n\r\n"], ids=["unfinished", "whole"])
async def test_a_url_that_is_too_long_is_refused(end: bytes) -> None:
    async with serving(Limits()) as world:
        client = await world.connect()
        client.writer.write(b"GET /?" + b"&a=b" * 5000 + end)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.0 414 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 414
        assert world.losses == {"size": 1}


async def test_requests_that_wait_for_others_are_not_gathered() -> None:
    async with serving(Limits()) as world:
        client = await world.connect()
        client.writer.write(b"GET /hold HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: world.held == 1)
        client.writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 2)
        assert await client.rest() == b""
        assert world.losses == {"pipelined": 1}
        world.hold.set()
        several = await world.connect()
        several.writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 3)
        assert await several.rest() == b""
        assert world.losses == {"pipelined": 2}


async def test_what_waits_behind_a_request_is_no_larger_than_a_head() -> None:
    async with serving(Limits(body_bytes=0)) as world:
        client = await world.connect()
        client.writer.write(b"GET /hold HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: world.held == 1)
        client.writer.write(b"GET / HTTP/1.1\r\nHost: test" + b"\r\nX: %s" % (b"x" * 1000) * 70 + b"\r\n\r\n")
        assert await client.rest() == b""
        assert world.losses == {"size": 1}


async def test_one_request_may_wait_for_another() -> None:
    async with serving(Limits()) as world:
        client = await world.connect()
        client.writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 2)
        assert [await client.answer(), await client.answer()] == [ANSWER] * 2
        assert not world.losses


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"])
async def test_what_is_no_request_is_refused_without_a_traceback(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(Limits()) as world:
        client = await world.connect()
        client.writer.write(sent)
        answer = await client.rest()
    assert answer.startswith(b"HTTP/1.0 400 Bad Request\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["reason"] == "BadRequest"
    assert caplog.records == []
    assert world.losses == {"malformed": 1}


@pytest.mark.parametrize("host", [b"xn--a", b"[::1%", b"\xff", b"x:99999999"])
async def test_a_host_that_is_none_is_refused_and_keeps_no_connection(host: bytes) -> None:
    async with serving(Limits(connections=2)) as world:
        for number in range(1, 4):
            client = await world.connect()
            client.writer.write(b"GET http://" + host + b"/ HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await client.rest()
            assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 400
            assert world.losses == {"malformed": number}
        assert await world.is_served()


async def test_what_was_refused_is_not_waited_for_at_the_end() -> None:
    async with asyncio.timeout(PATIENCE), serving(Limits(), grace=PATIENCE * 100) as world:
        client = await world.connect()
        client.writer.write(b"GET http://xn--a/ HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.rest()


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9"])
async def test_another_version_of_http_is_refused_in_ours(version: bytes) -> None:
    async with serving(Limits()) as world:
        client = await world.connect()
        client.writer.write(b"GET / " + version + b"\r\nHost: x\r\n\r\n")
        answered = await client.rest()
    assert answered.startswith(b"HTTP/1.1 505 ")
    assert json.loads(answered.partition(b"\r\n\r\n")[2])["code"] == 505


async def test_more_than_so_many_requests_at_once_are_refused_and_those_under_way_are_answered() -> None:
    async with serving(Limits(connections=2)) as world, asyncio.TaskGroup() as tasks:
        clients = [await world.connect() for _ in range(2)]
        answers = [tasks.create_task(client.ask("/hold"), name="held") for client in clients]
        await eventually(lambda: world.held == 2)
        assert await (await world.connect()).rest() == b""
        assert world.losses == {"connections": 1}
        world.hold.set()
        assert [await answer for answer in answers] == [ANSWER] * 2
        clients[0].writer.close()
        assert await world.is_served()


async def test_the_connection_that_waits_longest_makes_room() -> None:
    async with serving(Limits(connections=2)) as world:
        first, second = await world.connect(), await world.connect()
        assert await second.ask() == ANSWER
        assert await first.ask() == ANSWER
        assert await world.is_served()
        assert await second.rest() == b""
        assert world.losses == {"connections": 1}


@dataclass
class Pki:
    ours: Authority
    theirs: Authority
    tls: ServerTLS

    def context(self, certificate: Pair | None = None) -> ssl.SSLContext:
        if certificate is None:
            return client_context(ca=self.ours.certificate)
        key_pair = KeyPair.of(certificate=certificate.certificate, key=certificate.key)
        return client_context(ca=self.ours.certificate, key_pair=key_pair)


@pytest.fixture
def pki() -> Pki:
    ours, theirs = Authority.create("kubepcap"), Authority.create("front-proxy")
    pair = ours.issue("server", hosts=["localhost"])
    tls = ServerTLS(client_certificates="optional")
    tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key), client_ca=theirs.certificate)
    return Pki(ours, theirs, tls)


async def test_who_has_a_certificate_is_not_kept_out_by_those_who_have_none(pki: Pki) -> None:
    proven, nobody = pki.context(pki.theirs.issue("client")), pki.context()
    async with serving(Limits(connections=2), tls=pki.tls) as world:
        strangers = [await world.connect(nobody) for _ in range(2)]
        clients = [await world.connect(proven) for _ in range(2)]
        assert [await stranger.rest() for stranger in strangers] == [b"", b""]
        assert [await client.ask() for client in clients] == [ANSWER] * 2
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await world.connect(nobody)
        assert [await client.ask() for client in clients] == [ANSWER] * 2
        assert world.losses == {"connections": 3}


async def test_a_user_in_thousands_of_groups_and_a_long_token_are_let_in_by_the_front_proxy(
    pki: Pki,
) -> None:
    async with serving(Limits(), tls=pki.tls) as world:
        client = await world.connect(pki.context(pki.theirs.issue("front-proxy-client")))
        groups = b"".join(b"X-Remote-Group: group-of-some-name-%d\r\n" % number for number in range(10_000))
        token = b"Authorization: Bearer " + b"x" * 100_000 + b"\r\n"
        client.writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n" + groups + token + b"\r\n")
        assert await client.answer() == ANSWER


async def test_busy_strangers_leave_a_quarter_to_those_who_have_a_certificate(pki: Pki) -> None:
    proven, nobody = pki.context(pki.theirs.issue("client")), pki.context()
    async with serving(Limits(connections=8), tls=pki.tls) as world:
        strangers = [await world.connect(nobody) for _ in range(6)]
        for stranger in strangers:
            stranger.writer.write(b"GET /hold HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: world.held == 6)
        for number in range(1, 4):
            another = await world.connect(nobody)
            assert await another.rest() == b""
            assert world.losses == {"connections": number}
        clients = [await world.connect(proven) for _ in range(2)]
        assert [await client.ask() for client in clients] == [ANSWER] * 2
        world.hold.set()
        assert [await stranger.answer() for stranger in strangers] == [ANSWER] * 6


async def test_of_strangers_the_one_that_waits_longest_makes_room_for_another(pki: Pki) -> None:
    nobody = pki.context()
    async with serving(Limits(connections=4), tls=pki.tls) as world:
        first, second, third = [await world.connect(nobody) for _ in range(3)]
        assert [await client.ask() for client in (first, third)] == [ANSWER] * 2
        fourth = await world.connect(nobody)
        assert await second.rest() == b""
        assert [await client.ask() for client in (first, third, fourth)] == [ANSWER] * 3
        assert world.losses == {"connections": 1}


async def test_who_begins_no_handshake_makes_room_before_those_who_do(pki: Pki) -> None:
    async with serving(Limits(connections=2), tls=pki.tls) as world:
        beginning = await world.connect()
        beginning.writer.write(b"\x16\x03\x01\x02\x00")
        await asyncio.sleep(SOON)
        silent = [await world.connect() for _ in range(10)]
        client = await world.connect(pki.context())
        assert await client.ask() == ANSWER
        assert [await lost.rest() for lost in silent] == [b""] * 10
        assert world.losses == {"connections": 10}
        assert not beginning.reader.at_eof()


async def test_handshakes_under_way_count_and_make_room(pki: Pki) -> None:
    async with serving(Limits(connections=2), tls=pki.tls) as world:
        silent = [await world.connect() for _ in range(2)]
        client = await world.connect(pki.context())
        assert await client.ask() == ANSWER
        assert await silent[0].rest() == b""
        assert world.losses == {"connections": 1}


async def test_a_burst_of_connections_leaves_no_more_than_there_may_be(pki: Pki) -> None:
    async with serving(Limits(connections=2), tls=pki.tls) as world:
        burst = await asyncio.gather(*(world.connect() for _ in range(50)))
        assert await (await world.connect(pki.context(pki.theirs.issue("client")))).ask() == ANSWER
        assert [await client.rest() for client in burst[:49]] == [b""] * 49


async def test_a_handshake_that_does_not_end_is_ended_while_others_are_served(pki: Pki) -> None:
    async with serving(Limits(handshake=SOON), tls=pki.tls) as world:
        silent = await world.connect()
        assert await (await world.connect(pki.context())).ask() == ANSWER
        assert await silent.rest() == b""
        assert world.losses == {"handshake": 1}


async def test_a_client_that_does_not_read_is_cut_off_and_little_is_held_for_it() -> None:
    async with serving(Limits(stall=SOON)) as world:
        lazy = await world.connect()
        lazy.writer.write(b"GET /stream?bytes=1000000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: world.streamed > 0)
        assert await world.is_served()
        await eventually(lambda: bool(world.broken))
        assert isinstance(world.broken[0].__cause__, TimeoutError)
        assert world.streamed < 20_000_000  # what two sockets' buffers hold
        assert await world.is_served()


async def test_a_client_that_does_not_read_is_cut_off_through_tls(pki: Pki) -> None:
    async with serving(Limits(stall=SOON), tls=pki.tls) as world:
        lazy = await world.connect(pki.context())
        lazy.writer.write(b"GET /stream?bytes=1000000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: bool(world.broken))
        assert isinstance(world.broken[0].__cause__, TimeoutError)
        assert world.streamed < 20_000_000
        assert world.most_held < 4 * len(CHUNK)


async def test_a_client_that_reads_slowly_gets_all_of_it() -> None:
    size = 30_000_000
    async with serving(Limits(stall=SOON)) as world:
        slow = await world.connect()
        slow.writer.write(b"GET /stream?bytes=%d HTTP/1.1\r\nHost: test\r\n\r\n" % size)
        await slow.reader.readuntil(b"\r\n\r\n")
        for _ in range(12):  # three times as long as it might read nothing
            await slow.reader.readexactly(size // 24)
            await asyncio.sleep(SOON / 4)
        async with asyncio.timeout(PATIENCE):
            assert len(await slow.reader.readexactly(size // 2)) == size // 2
        assert not world.broken


async def test_a_body_up_to_its_limit_is_read_and_one_beyond_ends_the_connection() -> None:
    async with serving(Limits(head_bytes=10_000, body_bytes=2_000_000)) as world:
        client = await world.connect()
        client.writer.write(b"POST /read HTTP/1.1\r\nHost: test\r\nContent-Length: 2000000\r\n\r\n" + bytes(2_000_000))
        assert await client.answer() == b"2000000"
        client.writer.write(b"POST /read HTTP/1.1\r\nHost: test\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000))
        assert await client.rest() == b""
        assert world.losses == {"size": 1}
        assert await world.is_served()


@pytest.mark.parametrize("leave", ["close", "abort"])
async def test_a_request_whose_client_leaves_is_cancelled_and_not_waited_for(leave: str) -> None:
    async with asyncio.timeout(PATIENCE), serving(Limits(), grace=PATIENCE * 100, cancels_abandoned=True) as world:
        client = await world.connect()
        client.writer.write(b"GET /hold HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: world.held == 1)
        getattr(client.writer.transport, leave)()
        await eventually(lambda: world.cancelled == 1)
        assert await world.is_served()


async def test_a_client_that_does_not_read_is_told_from_one_that_leaves() -> None:
    async with serving(Limits(stall=SOON), cancels_abandoned=True) as world:
        lazy = await world.connect()
        lazy.writer.write(b"GET /stream?bytes=1000000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: bool(world.broken))
        assert isinstance(world.broken[0].__cause__, TimeoutError)


async def test_a_request_that_outlasts_the_grace_is_cancelled() -> None:
    async with asyncio.TaskGroup() as tasks:
        async with serving(Limits(), grace=0.1) as world:
            client = await world.connect()
            lost = tasks.create_task(client.rest(), name="held")
            client.writer.write(b"GET /hold HTTP/1.1\r\nHost: test\r\n\r\n")
            await eventually(lambda: world.held == 1)
            world.clients.clear()
        assert world.cancelled == 1
        assert await lost == b""
        client.writer.close()


async def test_nobody_is_let_in_once_it_is_closed() -> None:
    async with serving(Limits()) as world:
        assert await world.is_served()
    with pytest.raises(ConnectionRefusedError):
        await world.connect()
