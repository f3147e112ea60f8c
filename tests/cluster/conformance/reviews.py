"""What a server asks kube-apiserver to review, seen on its way."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from kube.certificates import ServerTLS
from kube.client import SUBJECTACCESSREVIEWS, Json
from kube.serve import listening
from kube.status import StatusError

UNREVIEWABLE = "unreviewable"
"""Users whose name begins like this have their reviews refused, so that nobody knows what they may do."""

_OF_ONE_CONNECTION = (hdrs.HOST, hdrs.CONNECTION, hdrs.TRANSFER_ENCODING, hdrs.CONTENT_LENGTH)


@dataclass
class Reviews:
    """A reverse proxy before kube-apiserver that remembers each SubjectAccessReview's `spec`.

    `refusals` are the codes and reasons with which the next reviews of a user are refused.
    """

    upstream: URL
    session: aiohttp.ClientSession
    specs: list[Json] = field(default_factory=list)
    refusals: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def observed(cls, upstream: str, *, upstream_ca: bytes, port: int, tls: ServerTLS) -> AsyncIterator[Self]:
        """Serve on loopback while the block runs."""
        trust = ssl.create_default_context(cadata=upstream_ca.decode())
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trust, limit=0), auto_decompress=False
        ) as session:
            reviews = cls(URL(upstream), session)
            app = web.Application(client_max_size=2**24)
            app.router.add_route("*", "/{path:.*}", reviews._pass_on)
            async with listening(app, host="127.0.0.1", port=port, tls=tls, grace=0.1):
                yield reviews

    def of(self, user: str) -> list[Json]:
        return [spec for spec in self.specs if spec.get("user") == user]

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path == SUBJECTACCESSREVIEWS.path() and request.method == hdrs.METH_POST:
            spec = (await request.json())["spec"]
            self.specs.append(spec)
            if spec["user"].startswith(UNREVIEWABLE):
                return _refused(403, "Forbidden")
            if refusals := self.refusals.get(spec["user"]):
                return _refused(*refusals.pop())
        headers = [(name, value) for name, value in request.headers.items() if name not in _OF_ONE_CONNECTION]
        url = self.upstream.join(URL(request.raw_path, encoded=True))
        async with self.session.request(request.method, url, headers=headers, data=body) as answer:
            response = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name not in _OF_ONE_CONNECTION:
                    response.headers.add(name, value)
            with suppress(ConnectionError):  # whoever asked has gone
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
        return response


def _refused(code: int, reason: str) -> web.Response:
    status = StatusError(code, "no review for this user", reason=reason)
    return web.json_response(status.to_json(), status=code)
