"""The server: what happens to a request, in order.

It gets an audit ID; its path is read, and refused when it is ambiguous; its user is authenticated and authorized; then
the endpoint answers. Health is all that anyone may ask without a name. Whatever goes wrong is a `metav1.Status`, and
once an answer has begun, a cut connection, so that nobody takes half a file for a whole one.
"""

import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler as AiohttpHandler

from apiserver.aggregation.authentication import Authenticated, Authenticator, User
from apiserver.aggregation.authorization import Authorizer
from apiserver.aggregation.discovery import Discovery
from apiserver.aggregation.document import Document
from apiserver.aggregation.group import Call, Endpoint, Found, Group, find
from apiserver.aggregation.openapi import OpenAPI, Schemas
from apiserver.aggregation.permission import Permissions
from apiserver.aggregation.requestinfo import MethodError, PathError, RequestInfo, parse
from kube.serve import Check, unready
from kube.status import StatusError, bad_request, internal_error, method_not_allowed, too_many_requests

_log = logging.getLogger(__name__)
_access_log = logging.getLogger(f"{__name__}.access")

HEALTH_PATHS = frozenset({"/healthz", "/livez", "/readyz"})
# A user can be in thousands of groups, each in a header of its own; aiohttp allows 128 headers.
PROTOCOL_LIMITS: Mapping[str, Any] = {"max_headers": 4096}
_STREAMS_PER_USER = 8
_STREAM_RETRY_SECONDS = 1
_AUDIT_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_REQUEST_INFO = web.RequestKey("request_info", RequestInfo)
_USER = web.RequestKey("user", User)
_WARNINGS = web.RequestKey("warnings", list)
_AUDIT = web.RequestKey("audit_id", str)
_BEGUN = web.RequestKey("begun", web.StreamResponse)


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
        streams_per_user: int = _STREAMS_PER_USER,
    ) -> None:
        """`checks` say what readiness needs beyond authentication and authorization, by name."""
        self._groups = tuple(groups)
        self._authenticator = authenticator
        self._authorizer = authorizer
        self._permissions = Permissions(authenticator, authorizer)
        self._discovery = Discovery(groups)
        self._openapi = OpenAPI(groups, schemas, title=title, version=version)
        self._root = Document({"paths": sorted((*self._discovery.paths, *self._openapi.paths, *HEALTH_PATHS))})
        self._streams: Counter[str] = Counter()
        self._streams_per_user = streams_per_user
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
        """The application, to be served over TLS with `PROTOCOL_LIMITS`."""
        app = web.Application(middlewares=[self._audited, self._answering_failures])
        # One route: aiohttp's own would match the decoded, collapsed path.
        app.router.add_route("*", "/{path:.*}", self._serve)
        app.on_response_prepare.append(self._complete_headers)
        return app

    @web.middleware
    async def _audited(self, request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
        given = request.headers.get("Audit-ID", "")
        request[_AUDIT] = given if _AUDIT_ID.fullmatch(given) else str(uuid.uuid4())
        began = time.monotonic()
        response: web.StreamResponse | None = None
        try:
            response = await handler(request)
        finally:
            info, user = request.get(_REQUEST_INFO), request.get(_USER)
            if info is None or info.path not in HEALTH_PATHS:
                _access_log.info(
                    "%s %s",
                    request.method,
                    request.raw_path,
                    extra={
                        "audit_id": request[_AUDIT],
                        "user": user.name if user else None,
                        "verb": info.verb if info else None,
                        "code": response.status if response else 0,
                        "bytes": response.body_length if response and response.prepared else 0,
                        "seconds": round(time.monotonic() - began, 4),
                    },
                )
        return response

    @web.middleware
    async def _answering_failures(self, request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            begun: web.StreamResponse | None = request.get(_BEGUN)
            if begun is None:
                return answer(_as_status(error, request[_AUDIT]))
            transport = request.transport
            if transport is not None and not transport.is_closing():
                _log.warning("answer %s is cut short: %s", request[_AUDIT], error)
                transport.abort()
            # Else the client went away: there is nobody to tell, and nothing is wrong.
            return begun

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            info = parse(request.method, request.raw_path)
        except PathError as error:
            raise bad_request(str(error)) from error
        except MethodError as error:
            raise method_not_allowed(str(error)) from error
        request[_REQUEST_INFO] = info
        if info.path in HEALTH_PATHS:
            return self._health(info)
        if info.verb == "proxy":
            # kube-apiserver reads no subresource out of such a path, and so has not authorized what it leads to.
            raise _not_found()
        authenticated = await self._authenticator.authenticate(request.headers, request.transport)
        user = request[_USER] = authenticated.user
        found = find(self._groups, info)
        if found is not None and (problem := found.problem()) is not None:
            raise bad_request(problem)
        await self._authorizer.authorize(user, info)
        if info.is_resource_request:
            return await self._call(request, info, authenticated, found)
        return self._document(request, info)

    async def _call(
        self, request: web.Request, info: RequestInfo, authenticated: Authenticated, found: Found | None
    ) -> web.StreamResponse:
        if found is None:
            raise _not_found()
        endpoint = found.endpoints.get(info.verb)
        if endpoint is None:
            raise method_not_allowed(
                f'{info.verb or request.method} is not supported on "{info.resource}/{info.subresource}"; '
                f"these verbs are: {', '.join(sorted(found.endpoints))}"
            )
        user = authenticated.user
        warnings = request[_WARNINGS] = []
        call = Call(request=request, info=info, user=user, segments=found.segments, warnings=warnings)
        permission = self._permissions.upheld(authenticated, info) if endpoint.streams else nullcontext()
        with self._counted(user, endpoint):
            async with permission:
                return await endpoint.handle(call)

    @contextmanager
    def _counted(self, user: User, endpoint: Endpoint) -> Iterator[None]:
        if not endpoint.streams:
            yield
            return
        if self._streams[user.name] >= self._streams_per_user:
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

    def _document(self, request: web.Request, info: RequestInfo) -> web.Response:
        path = info.path.rstrip("/")
        document = self._discovery.document(path, request.headers.get(hdrs.ACCEPT, ""))
        document = document or self._openapi.document(path) or (None if path else self._root)
        if document is None:
            raise _not_found()
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            raise method_not_allowed(f"{request.method} is not allowed here; use GET")
        return document.respond(request)

    def _health(self, info: RequestInfo) -> web.Response:
        wrong = [line.partition(":")[0] for line in unready(self.checks)] if info.path == "/readyz" else []
        if wrong:
            # Anyone may ask, so the reasons go to the log and to the kubelet's port.
            return web.Response(status=503, text="".join(f"[-]{name} failed: reason withheld\n" for name in wrong))
        return web.Response(text="ok")

    async def _complete_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        request[_BEGUN] = response
        response.headers["Audit-ID"] = request[_AUDIT]
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-cache, private")
        response.headers["X-Content-Type-Options"] = "nosniff"
        for warning in request.get(_WARNINGS, ()):
            response.headers.add(hdrs.WARNING, f"299 - {json.dumps(warning)}")
        if self._draining:
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
