"""Connections to a server, and what clients may take of it: how many connect at once, and how long each may wait.

aiohttp waits for its clients for ever, or nearly so. Whoever may connect could then hold all that a server has: with
connections that ask for nothing, heads of requests that come a byte a second, or answers that are never read. Who has
shown a valid certificate is not kept out by strangers, who have not: these get three quarters of the connections at
most, and of theirs, the one that waits longest makes room.
"""

import asyncio
import errno
import json
import logging
import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, cast

from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from yarl import URL

from kube.certificates import ServerTLS
from kube.status import StatusError, bad_request

_log = logging.getLogger(__name__)

Loss = Literal["connections", "handshake", "head", "idle", "malformed", "pipelined", "size"]
"""What a connection was closed for: which of the limits it met, a TLS handshake that failed, or what is no request."""

Left = Literal["client", "stalled client"]
"""Who ended a connection, if it was not we: its client, or the kernel since the client took nothing of an answer."""

_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_BACKLOG = 1024
# Connections taken at a time; others have their turn before more are.
_ACCEPTED_AT_ONCE = 64
# Requests that wait for an answer to the one before; Go's clients send none.
_MOST_WAITING = 1
_MOST_HEADERS = 16384
_ACCEPT_RETRY_SECONDS = 1.0
_LAST_SECONDS = 1.0
# Bytes of an answer that a client does not take yet; asyncio's own limit for TLS is eight times that.
_WRITE_BUFFER = 1 << 16
_LONGEST_SWEEP = 1.0
_VERSIONS = frozenset({HttpVersion10, HttpVersion11})
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may take. Times in seconds, sizes in bytes.

    `connections` are open at once, those in a TLS handshake included; where certificates are asked for, strangers get
    three quarters of them. A request's `head` has to be complete that long
    after its first byte, the first one's that long after the connection was made; between two requests a connection
    may be `idle`. `line_bytes` bound a request's line, `head_bytes` that and the headers together, `body_bytes` what
    may follow while it is answered. Of who shows no certificate, a head has `stranger_head_bytes` at most. With
    `stall`, a client that takes none of an answer for so long is cut off.

    A connection in a TLS handshake takes 0.3 MB, most of it asyncio's buffer, and so do a stranger's head and what was
    read with it: 256 connections take about 80 MB of strangers, who have not said yet who they are. kube-apiserver has
    one for each request under way, since it speaks HTTP/1.1 here.
    """

    connections: int = 256
    handshake: float = 10.0
    # As k8s.io/apiserver (ReadHeaderTimeout, MaxHeaderBytes).
    head: float = 32.0
    head_bytes: int = 1 << 20
    # Thousands of groups come from the front proxy alone; a token, and whatever else is a client's own, fits.
    stranger_head_bytes: int = 1 << 16
    # A URL is read before it is known whose it is, which takes long if it is long.
    line_bytes: int = 1 << 14
    body_bytes: int = 1 << 20
    # Longer than Go's clients keep one (90 s): who closes first while the other asks makes a request fail.
    idle: float = 120.0
    stall: float | None = None

    @property
    def sweep(self) -> float:
        """How often to look for connections whose time is over."""
        return min(_LONGEST_SWEEP, self.head / 4, self.idle / 4)


class Connections:
    """Accepts connections for an application, keeps them to the limits, and ends them."""

    def __init__(
        self,
        server: web.Server,
        *,
        limits: Limits,
        tls: ServerTLS | None,
        on_loss: Callable[[Loss], None],
        cancels_abandoned: bool,
    ) -> None:
        """`server` is that of an `aiohttp.web.AppRunner`, which makes requests of what comes."""
        self.limits = limits
        self.cancels_abandoned = cancels_abandoned
        self._tls = tls
        self.on_loss = on_loss
        self._loop = asyncio.get_running_loop()
        self._server = _Server(
            server,
            self,
            access_log=None,
            max_headers=_MOST_HEADERS,
            max_field_size=limits.head_bytes,
            max_line_size=limits.line_bytes,
        )
        self._open: dict[Connection, asyncio.Task[None]] = {}
        self._strangers: set[Connection] = set()
        self._most_strangers = limits.connections - (limits.connections // 4 if tls and tls.asks else 0)
        # Of both, the one that waits longest comes first.
        self._silent: dict[Connection, None] = {}
        self._yielding: dict[Connection, None] = {}
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._listener: socket.socket | None = None
        self._sweep: asyncio.TimerHandle | None = None

    def listen(self, host: str | None, port: int) -> int:
        """Begin to accept; returns the port, which the system chooses when `port` is 0. Raises `OSError`."""
        self._listener = _listening_socket(host, port)
        self._loop.add_reader(self._listener, self._accept)
        self._sweep = self._loop.call_later(self.limits.sweep, self._close_overdue)
        return int(self._listener.getsockname()[1])

    async def close(self, grace: float) -> None:
        """Accept no more; requests under way get `grace` seconds to end."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        for connection, opening in self._open.items():
            if not connection.is_made:
                opening.cancel()
        await asyncio.sleep(0)  # what has been received becomes requests before those that are idle are closed
        self._server.pre_shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                # Not left to aiohttp, which would wait that long twice.
                await self._quiet.wait()
        await self._server.shutdown(_LAST_SECONDS)
        if self._sweep is not None:
            self._sweep.cancel()

    def connected(self, connection: "Connection", *, proven: bool) -> None:
        """It is made, handshake included. A stranger too many costs a stranger its connection: this one if all work."""
        if connection not in self._open:  # it made room just before
            connection.abort()
            return
        if proven:
            self._yielding.pop(connection, None)
            return
        self._strangers.add(connection)
        if len(self._strangers) > self._most_strangers:
            self.lose(next(other for other in self._yielding if other in self._strangers), "connections")

    def yields(self, connection: "Connection") -> None:
        """It waits from now on, and makes room when others want it."""
        if connection in self._open:
            self._yielding.pop(connection, None)
            self._yielding[connection] = None

    def began(self, connection: "Connection") -> None:
        """A request on the connection is to be answered."""
        self._yielding.pop(connection, None)
        self._busy += 1
        self._quiet.clear()

    def ended(self) -> None:
        """It is answered."""
        self._busy -= 1
        if not self._busy:
            self._quiet.set()

    def forget(self, connection: "Connection") -> None:
        """It is closed."""
        self._open.pop(connection, None)
        self._silent.pop(connection, None)
        self._yielding.pop(connection, None)
        self._strangers.discard(connection)

    def lose(self, connection: "Connection", loss: Loss) -> None:
        """Close it at once, answer or not."""
        self.on_loss(loss)
        if connection.is_made:
            connection.abort()
        else:
            self._open[connection].cancel()
        self.forget(connection)

    def _accept(self) -> None:
        assert self._listener is not None  # noqa: S101 - who calls is its reader
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS:
                    raise
                _log.error("no connection can be accepted: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_ACCEPT_RETRY_SECONDS, self._accept_again)
                return
            self._admit(accepted)

    def _accept_again(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _admit(self, accepted: socket.socket) -> None:
        if len(self._open) >= self.limits.connections and not self._make_room():
            self.on_loss("connections")
            accepted.close()
            return
        accepted.setblocking(False)
        if self.limits.stall is not None:
            # The kernel alone sees whether anything of what is sent is taken; it counts windows that stay closed too.
            milliseconds = round(self.limits.stall * 1000)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        connection = self._server()
        making = self._open[connection] = self._loop.create_task(
            self._make(connection, accepted), name="new connection"
        )
        self._silent[connection] = None
        making.add_done_callback(lambda _: self._made(connection, accepted))

    def _make_room(self) -> bool:
        yielding = self._silent or self._yielding
        if not yielding:
            return False
        self.lose(next(iter(yielding)), "connections")
        return True

    async def _make(self, connection: "Connection", accepted: socket.socket) -> None:
        handshake = self.limits.handshake if self._tls else None
        try:
            if self._tls:
                # A handshake takes memory and time; who does not even begin one is the first to make room.
                async with asyncio.timeout(handshake):
                    await self._readable(accepted)
            self._silent.pop(connection, None)
            self.yields(connection)
            context = self._tls.context if self._tls else None
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=context, ssl_handshake_timeout=handshake
            )
        except OSError as error:
            self.on_loss("handshake")
            _log.debug("a TLS handshake failed: %s", error)

    async def _readable(self, accepted: socket.socket) -> None:
        spoke = asyncio.Event()
        self._loop.add_reader(accepted, spoke.set)
        try:
            await spoke.wait()
        finally:
            self._loop.remove_reader(accepted)

    def _made(self, connection: "Connection", accepted: socket.socket) -> None:
        if not connection.is_made:
            self.forget(connection)
            accepted.close()  # if it made room before it was begun with, nobody else would

    def _close_overdue(self) -> None:
        now = self._loop.time()
        for connection in [connection for connection in self._open if connection.deadline < now]:
            self.lose(connection, connection.waits_for)
        self._sweep = self._loop.call_later(self.limits.sweep, self._close_overdue)


class Connection(web.RequestHandler):
    """One connection: aiohttp's protocol, which knows besides what it waits for, and since when."""

    def __init__(self, server: "_Server", connections: Connections, **options: Any) -> None:
        super().__init__(server, **options)
        self._connections = connections
        self._limits = connections.limits
        self._made: asyncio.Transport | None = None  # aiohttp lets go of it before it is closed
        self._busy = False
        self._proven = False
        self._refused = False
        self.refusal: StatusError | None = None
        self.left: Left | None = None
        self._received = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        self.waits_for: Literal["head", "idle"] = "head"
        self.deadline = math.inf

    @property
    def is_made(self) -> bool:
        """Whether there is more of it than a TLS handshake under way."""
        return self._made is not None

    @property
    def _allowed_head(self) -> int:
        most = self._limits.head_bytes
        return most if self._proven else min(most, self._limits.stranger_head_bytes)

    @property
    def _allowed(self) -> int:
        return self._allowed_head + (self._limits.body_bytes if self._busy else 0)

    def refuses(self, message: RawRequestMessage) -> bool:
        """Whether the head of a request is too large, which came so fast that it was whole when that could be seen."""
        if self._received <= self._allowed_head:
            return False
        size = len(message.path) + sum(len(name) + len(value) for name, value in message.raw_headers)
        return size > self._allowed_head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._made = cast("asyncio.Transport", transport)
        self._made.set_write_buffer_limits(_WRITE_BUFFER)
        # OpenSSL has none that it did not verify.
        self._proven = bool(transport.get_extra_info("peercert"))
        assert self._task_handler is not None  # noqa: S101 - it has been started just now
        # Whatever ends the task that answers, also before a request's own has begun, ends the request.
        self._task_handler.add_done_callback(lambda _: self.end())
        self._wait("head", self._limits.head)
        self._connections.connected(self, proven=self._proven)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.forget(self)
        if not self._force_close:
            self.left = "stalled client" if isinstance(exc, TimeoutError) else "client"
        answering = self._task_handler
        # Who writes is told by an error, and why.
        is_told = self.writing_paused and exc is not None
        super().connection_lost(exc)
        if self._connections.cancels_abandoned and answering is not None and not is_told:
            answering.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._busy and self.waits_for == "idle":
            self._wait("head", self._limits.head)
        self._received += len(data)
        super().data_received(data)
        beginning = bool(self._messages) and not self._busy
        if len(self._messages) - beginning > _MOST_WAITING:
            self._refuse("pipelined")
        # A request that is about to begin may have brought some of its body.
        elif self._received > self._allowed and not beginning:
            self._refuse("size")

    def begin(self, body: StreamReader, *, refusal: StatusError | None) -> None:
        """A request's head is complete, and with a `refusal` that is all that comes of it."""
        self.refusal = refusal
        self._body = body
        self._connections.began(self)
        self._busy = True
        self._received = 0
        self.deadline = math.inf

    def end(self) -> None:
        """The request is answered."""
        if not self._busy:
            return
        self._connections.ended()
        self._busy = False
        self._received = 0
        self._wait("idle", self._limits.idle)

    def lost(self, loss: Loss) -> None:
        """Count what it is closed for."""
        self._connections.on_loss(loss)

    def abort(self) -> None:
        """Close it at once, with whatever is still to be sent."""
        if self._made is not None:
            self._made.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP request. A client can send such as it likes, so no traceback is logged."""
        self.end()
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        _log.debug("what %s sent is no request: %s", request.remote, exc)
        if isinstance(exc, LineTooLong):
            self.lost("size")
            return _refused(_LINE_TOO_LONG if self._limits.line_bytes in exc.args else _HEAD_TOO_LARGE)
        self.lost("malformed")
        return _refused(_NO_REQUEST)

    def _wait(self, what: Literal["head", "idle"], seconds: float) -> None:
        self.waits_for = what
        self.deadline = self._loop.time() + seconds
        if not self._proven:
            self._connections.yields(self)

    def _refuse(self, loss: Literal["pipelined", "size"]) -> None:
        self._refused = True
        self.lost(loss)
        if not self._busy and not self._messages and self._body.is_eof() and self._made is not None:
            self._made.write(_raw_answer(_HEAD_TOO_LARGE))
        self.force_close()


class _Server(web.Server):
    """aiohttp's, which makes connections of ours and tells them when a request begins and ends."""

    def __init__(self, server: web.Server, connections: Connections, **options: Any) -> None:
        super().__init__(_ending(server.request_handler), request_factory=_beginning(server.request_factory))
        self._kept = connections
        self._options = options

    def __call__(self) -> Connection:
        return Connection(self, self._kept, loop=asyncio.get_running_loop(), **self._options)


def _beginning(make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    def begin(message: RawRequestMessage, body: StreamReader, connection: Connection, *more: object) -> web.BaseRequest:
        refusal = None
        if message.version not in _VERSIONS:  # aiohttp would answer in whatever version it was asked in
            refusal, message = _OTHER_VERSION, message._replace(version=HttpVersion11)
        if connection.refuses(message):
            connection.lost("size")
            refusal = _HEAD_TOO_LARGE
        try:
            request = make(message, body, connection, *more)
        except ValueError as error:  # of the host in an absolute URL, which is read here alone
            _log.debug("what was sent is no request: %s", error)
            connection.lost("malformed")
            refusal = _NO_REQUEST
            request = make(message._replace(path="/", url=URL("/")), body, connection, *more)
        connection.begin(body, refusal=refusal)
        return request

    return begin


def _ending(handler: _Handler) -> _Handler:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = cast("Connection", request.protocol)
        try:
            return await handler(request) if connection.refusal is None else _refused(connection.refusal)
        finally:
            connection.end()

    return handle


def _refused(refusal: StatusError) -> web.Response:
    body = json.dumps(refusal.to_json()).encode()
    refused = web.Response(status=refusal.code, body=body, content_type="application/json")
    refused.force_close()
    return refused


def _listening_socket(host: str | None, port: int) -> socket.socket:
    """Without a host, one for every address of both families."""
    if host is None and socket.has_dualstack_ipv6():
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    else:
        family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
        listener = socket.create_server((host or "", port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _raw_answer(refusal: StatusError) -> bytes:
    """For a client of which no request was read."""
    body = json.dumps(refusal.to_json()).encode()
    head = (
        f"HTTP/1.1 {refusal.code} {HTTPStatus(refusal.code).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + body


_HEAD_TOO_LARGE = StatusError(431, "the request's line and headers are too large", reason="")
_LINE_TOO_LONG = StatusError(414, "the request's URL is too long", reason="")
_OTHER_VERSION = StatusError(505, "HTTP/1.1 and HTTP/1.0 are what is spoken here", reason="")
_NO_REQUEST = bad_request("what was sent can't be read as a request of HTTP/1.1")
