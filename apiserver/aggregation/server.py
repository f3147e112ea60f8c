"""The server: what happens to a request, in order.

It gets an audit ID; its path is read, and refused when it is ambiguous; its user is authenticated and authorized; then
the endpoint answers. Health is all that anyone may ask without a name. Whatever goes wrong is a `metav1.Status`, and
once an answer has begun, a cut connection, so that nobody takes half a file for a whole one.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler as AiohttpHandler

from apiserver.aggregation.authentication import Authenticated, Authenticator, User
from apiserver.aggregation.authorization import Authorizer
from apiserver.aggregation.discovery import Discovery
from apiserver.aggregation.document import Document
from apiserver.aggregation.group import Call, Found, Group, find
from apiserver.aggregation.metrics import CONTENT_TYPE, Metrics, Reported, Result, reported
from apiserver.aggregation.openapi import OpenAPI, Schemas
from apiserver.aggregation.permission import Permissions
from apiserver.aggregation.requestinfo import MethodError, PathError, RequestInfo, parse
from kube.connections import Connection, Left
from kube.serve import Check, unready
from kube.status import StatusError, bad_request, internal_error, method_not_allowed, timed_out, too_many_requests

_log = logging.getLogger(__name__)
_access_log = logging.getLogger(f"{__name__}.access")

HEALTH_PATHS = frozenset({"/healthz", "/livez", "/readyz"})
METRICS_PATH = "/metrics"
_STREAMS_PER_USER = 8
_STREAM_RETRY_SECONDS = 1
# kube-apiserver gives up on a request that is not long-running after that time.
_REQUEST_SECONDS = 60.0
_LONGEST_LOGGED = 1024
_AUDIT_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_READING = (hdrs.METH_GET, hdrs.METH_HEAD)


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """A request, and what becomes of it.

    `sent` counts the bytes of the body that the connection took; of an answer that is `cut`, those on their way at that
    moment may not have arrived.
    """

    audit_id: str
    began: float = field(default_factory=time.monotonic)
    info: RequestInfo | None = None
    user: User | None = None
    is_served: bool = False
    warnings: list[str] = field(default_factory=list)
    begun: web.StreamResponse | None = None
    sent: int = 0
    cut: Literal["server"] | Left | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def reported(self, method: str) -> Reported:
        return reported(method, self.info, is_served=self.is_served)

    def count(self, size: int, _with_head: int) -> None:
        self.sent += size


_EXCHANGE = web.RequestKey("exchange", _Exchange)


class Server:
    """An aggregated API server of some groups, on top of `aiohttp.web`."""

    def __init__(
        self,
        *,
        groups: Sequence[Group],
        schemas: Schemas,
        title: str,
        version: str,
        authenticator: Authenticator,
        authorizer: Authorizer,
        checks: Mapping[str, Check],
        metrics: Metrics,
        streams_per_user: int = _STREAMS_PER_USER,
        request_seconds: float = _REQUEST_SECONDS,
    ) -> None:
        """`checks` say what readiness needs beyond authentication and authorization, by name.

        A request that does not stream has to be answered within `request_seconds`.
        """
        self._groups = tuple(groups)
        self._authenticator = authenticator
        self._authorizer = authorizer
        self._permissions = Permissions(authenticator, authorizer)
        self._discovery = Discovery(groups)
        self._openapi = OpenAPI(groups, schemas, title=title, version=version)
        self._root = Document(
            {"paths": sorted((*self._discovery.paths, *self._openapi.paths, *HEALTH_PATHS, METRICS_PATH))}
        )
        self._metrics = metrics
        self._streams: Counter[str] = Counter()
        self._streams_per_user = streams_per_user
        self._request_seconds = request_seconds
        self._draining = False
        self.checks: Mapping[str, Check] = {
            "authentication": authenticator.check,
            "authorization": authorizer.check,
            **checks,
            "shutdown": lambda: "shutting down" if self._draining else None,
        }

    def drain(self) -> None:
        """From now on readiness fails and connections are closed after their answer; requests are still taken."""
        self._draining = True

    def application(self) -> web.Application:
        """The application, to be served over TLS."""
        app = web.Application(middlewares=[self._observing, self._answering])
        # One route: aiohttp's own would match the decoded, collapsed path.
        app.router.add_route("*", "/{path:.*}", self._serve, expect_handler=_expect_nothing)
        app.on_response_prepare.append(self._complete_headers)
        return app

    @web.middleware
    async def _observing(self, request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
        given = request.headers.get("Audit-ID", "")
        audit_id = given if _AUDIT_ID.fullmatch(given) else str(uuid.uuid4())
        exchange = request[_EXCHANGE] = _Exchange(audit_id=audit_id)
        request.writer.on_body_write = exchange.count
        try:
            with self._metrics.under_way(request.method):
                return await handler(request)
        except asyncio.CancelledError:
            exchange.cut = _left(request) or "server"
            raise
        finally:
            self._record(request, exchange)

    def _record(self, request: web.Request, exchange: _Exchange) -> None:
        labels = exchange.reported(request.method)
        code = exchange.begun.status if exchange.begun else 0
        self._metrics.answered(labels, code=code, seconds=exchange.seconds, size=exchange.sent)
        if exchange.cut in ("server", "stalled client"):
            self._metrics.aborted(labels)
        if exchange.info is None or exchange.info.path not in HEALTH_PATHS:
            target = request.raw_path[:_LONGEST_LOGGED]
            _access_log.info("%s %s", request.method, target, extra=_access(request, exchange, code))

    @web.middleware
    async def _answering(self, request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
        """Send the whole answer here, where it is known what it is an answer to."""
        exchange = request[_EXCHANGE]
        try:
            try:
                response = await handler(request)
            except Exception as error:
                if exchange.begun is not None:
                    raise
                response = answer(_as_status(error, exchange.audit_id))
            await response.prepare(request)
            await response.write_eof()
        except Exception as error:
            if exchange.begun is None:
                raise
            _cut(request, exchange, error)
            if isinstance(error, StatusError):
                self._metrics.terminated(exchange.reported(request.method), code=error.code)
            return exchange.begun
        return response

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        exchange = request[_EXCHANGE]
        try:
            async with asyncio.timeout(self._request_seconds) as limit:
                return await self._dispatch(request, exchange, limit)
        except TimeoutError as error:
            if not limit.expired():
                raise
            self._metrics.terminated(exchange.reported(request.method), code=504)
            raise timed_out("request did not complete within the allotted timeout") from error

    async def _dispatch(self, request: web.Request, exchange: _Exchange, limit: asyncio.Timeout) -> web.StreamResponse:
        try:
            info = exchange.info = parse(request.method, request.raw_path)
        except PathError as error:
            raise bad_request(str(error)) from error
        except MethodError as error:
            raise method_not_allowed(str(error)) from error
        if info.path in HEALTH_PATHS:
            exchange.is_served = True
            return self._health(info)
        if info.verb == "proxy":
            # kube-apiserver reads no subresource out of such a path, and so has not authorized what it leads to.
            raise _not_found()
        with _timed(self._metrics.authenticated, "success", {401: "failure"}):
            authenticated = await self._authenticator.authenticate(request.headers, request.transport)
        user = exchange.user = authenticated.user
        found = find(self._groups, info)
        exchange.is_served = found is not None
        if found is not None and (problem := found.problem()) is not None:
            raise bad_request(problem)
        with _timed(self._metrics.authorized, "allowed", {403: "denied"}):
            await self._authorizer.authorize(user, info)
        if not info.is_resource_request:
            return self._document(request, exchange, info)
        if found is None:
            raise _not_found()
        call = Call(request=request, info=info, user=user, segments=found.segments, warnings=exchange.warnings)
        return await self._call(call, found, authenticated, exchange, limit)

    async def _call(
        self, call: Call, found: Found, authenticated: Authenticated, exchange: _Exchange, limit: asyncio.Timeout
    ) -> web.StreamResponse:
        request, info = call.request, call.info
        endpoint = found.endpoints.get(info.verb)
        if endpoint is None:
            raise method_not_allowed(
                f'{info.verb or request.method} is not supported on "{info.resource}/{info.subresource}"; '
                f"these verbs are: {', '.join(sorted(found.endpoints))}"
            )
        if not endpoint.streams:
            return await endpoint.handle(call)
        labels = exchange.reported(request.method)
        with self._counted(call.user, labels), self._metrics.long_running(request.method, labels):
            limit.reschedule(None)
            async with self._permissions.upheld(authenticated, info, since=exchange.began):
                return await endpoint.handle(call)

    @contextmanager
    def _counted(self, user: User, labels: Reported) -> Iterator[None]:
        if self._streams[user.name] >= self._streams_per_user:
            self._metrics.terminated(labels, code=429)
            raise too_many_requests(
                f'user "{user.name}" has {self._streams_per_user} downloads under way; wait for one to end',
                retry_after=_STREAM_RETRY_SECONDS,
            )
        self._streams[user.name] += 1
        try:
            yield
        finally:
            self._streams[user.name] -= 1
            if not self._streams[user.name]:
                del self._streams[user.name]

    def _document(self, request: web.Request, exchange: _Exchange, info: RequestInfo) -> web.Response:
        path = info.path.rstrip("/")
        document = self._discovery.document(path, request.headers.get(hdrs.ACCEPT, ""))
        document = document or self._openapi.document(path) or (None if path else self._root)
        exchange.is_served = document is not None or path == METRICS_PATH
        if not exchange.is_served:
            raise _not_found()
        if request.method not in _READING:
            raise method_not_allowed(f"{request.method} is not allowed here; use GET")
        if document is None:
            return web.Response(body=self._metrics.exposition(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})
        return document.respond(request)

    def _health(self, info: RequestInfo) -> web.Response:
        wrong = [line.partition(":")[0] for line in unready(self.checks)] if info.path == "/readyz" else []
        if wrong:
            # Anyone may ask, so the reasons go to the log and to the kubelet's port.
            return web.Response(status=503, text="".join(f"[-]{name} failed: reason withheld\n" for name in wrong))
        return web.Response(text="ok")

    async def _complete_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        exchange = request[_EXCHANGE]
        exchange.begun = response
        response.headers["Audit-ID"] = exchange.audit_id
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-cache, private")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.popall(hdrs.SERVER, None)
        for warning in exchange.warnings:
            response.headers.add(hdrs.WARNING, f"299 - {json.dumps(warning)}")
        if self._draining or request.can_read_body:  # a body is not read, so where the next request begins is not known
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"  # aiohttp has decided on its own header before this is called


def answer(failure: StatusError) -> web.Response:
    """The failure as an HTTP answer."""
    headers = {hdrs.CONTENT_TYPE: "application/json"}
    if failure.retry_after is not None:
        headers[hdrs.RETRY_AFTER] = str(failure.retry_after)
    if failure.code == 401:
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    return web.Response(status=failure.code, body=json.dumps(failure.to_json()).encode(), headers=headers)


def _not_found() -> StatusError:
    return StatusError(404, "the server could not find the requested resource")


def _as_status(error: Exception, audit_id: str) -> StatusError:
    """What the client is told of an error: never more than we meant to say."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, web.HTTPException):
        return StatusError(error.status, error.reason)
    _log.error("request %s failed", audit_id, exc_info=error)
    return internal_error(f"Internal error occurred; the server's log has it under {audit_id}")


def _cut(request: web.Request, exchange: _Exchange, error: Exception) -> None:
    """End an answer that has begun so that it is seen not to be whole."""
    transport = request.transport
    if transport is not None and not transport.is_closing():
        exchange.cut = "server"
        _log.warning("answer %s is cut short: %s", exchange.audit_id, error)
        transport.abort()
    else:
        # There is nobody to tell, and nothing is wrong. A timeout is the kernel's: nothing of the answer was taken.
        exchange.cut = "stalled client" if isinstance(error.__cause__, TimeoutError) else "client"


def _left(request: web.Request) -> Left | None:
    return request.protocol.left if isinstance(request.protocol, Connection) else None


def _access(request: web.Request, exchange: _Exchange, code: int) -> dict[str, object]:
    """The fields of a line of the access log."""
    info, user = exchange.info, exchange.user
    return {
        "audit_id": exchange.audit_id,
        "remote": (request.remote or "").removeprefix("::ffff:"),  # an IPv4 address, which came to an IPv6 socket
        "user": user.name if user else None,
        "verb": info.verb if info else None,
        "object": _reference(info) if info and info.is_resource_request else None,
        "code": code,
        "bytes": exchange.sent,
        "cut": exchange.cut,
        "seconds": round(exchange.seconds, 4),
    }


def _reference(info: RequestInfo) -> dict[str, str]:
    """As `audit.k8s.io` refers to an object, less what is not given."""
    named = {
        "group": info.api_group,
        "resource": info.resource,
        "subresource": info.subresource,
        "namespace": info.namespace,
        "name": info.name,
    }
    return {key: value for key, value in named.items() if value}


@contextmanager
def _timed(observe: Callable[[Result, float], None], good: Result, refusals: Mapping[int, Result]) -> Iterator[None]:
    """Observe how long a decision took, and which it was; a failure with a code not of `refusals` is an error."""
    began = time.monotonic()
    result = good
    try:
        yield
    except StatusError as failure:
        result = refusals.get(failure.code, "error")
        raise
    finally:
        observe(result, time.monotonic() - began)


async def _expect_nothing(_: web.Request) -> None:
    """No client is told to go on and send a body (RFC 9110, 10.1.1): it is not wanted, and the answer needs none."""
