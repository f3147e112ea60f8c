"""Serves this node's capture files, over mutual TLS, to kubepcap's apiserver and nobody else.

Who may read which capture was decided there; here only the client's certificate counts. Bytes are streamed in pieces,
never gathered.
"""

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from agent.capturing import Capturer, CapturerError
from agent.ranges import Part, UnsatisfiableError, part
from agent.store import Readable, Store
from api import names
from kube import status

CLIENT_NAME: Final = "kubepcap-apiserver"
_CHUNK_BYTES: Final = 256 << 10
_FLUSH_SECONDS: Final = 2.0
_MEDIA_TYPE: Final = "application/vnd.tcpdump.pcap"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(store: Store, capturer: Capturer) -> web.Application:
    """The HTTP application; to be served with client certificates required."""
    server = FileServer(store, capturer)
    app = web.Application(middlewares=[_as_status, _apiserver_alone])
    app.router.add_get("/captures/{uid}/files", server.list_files, allow_head=False)
    app.router.add_get("/captures/{uid}/files/{name}", server.download)
    return app


class FileServer:
    """Answers for one store."""

    def __init__(self, store: Store, capturer: Capturer) -> None:
        self._store = store
        self._capturer = capturer

    async def list_files(self, request: web.Request) -> web.Response:
        """`GET /captures/{uid}/files`: the files, with what has been captured up to now."""
        uid = _uid(request)
        await self._flush([run.target.id for run in self._capturer.running() if run.target.capture_uid == uid])
        files = await self._store.files(uid)
        return web.json_response({"items": [file.to_json() for file in files]})

    async def download(self, request: web.Request) -> web.StreamResponse:
        """`GET` or `HEAD /captures/{uid}/files/{name}`: the bytes, or a part of them."""
        uid, name = _uid(request), request.match_info["name"]
        if not names.is_file_name(name):
            raise status.not_found("packetcaptures/files", name)
        if (target := self._store.target_of(uid, name)) is not None:
            await self._flush([target])
        try:
            file = await self._store.open(uid, name)
        except FileNotFoundError:
            raise status.not_found("packetcaptures/files", name, hint="rotation or deletion removed it") from None
        try:
            return await self._send(request, file, etag=_etag(uid, name))
        finally:
            os.close(file.descriptor)

    async def _send(self, request: web.Request, file: Readable, *, etag: str) -> web.StreamResponse:
        headers = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "no-store",
            "Kubepcap-Size": str(file.size),
        }
        if file.finished and file.sha256:
            headers["Kubepcap-Sha256"] = file.sha256
        if file.finished and _names_etag(request.headers.get("If-None-Match"), etag):
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        try:
            wanted = _wanted(request, file.size, etag)
        except UnsatisfiableError as error:
            refusal = status.StatusError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, str(error))
            return _status_response(refusal, headers | {"Content-Range": f"bytes */{file.size}"})
        if wanted.partial:
            headers["Content-Range"] = f"bytes {wanted.start}-{wanted.end - 1}/{file.size}"
        response = web.StreamResponse(
            status=HTTPStatus.PARTIAL_CONTENT if wanted.partial else HTTPStatus.OK, headers=headers
        )
        response.content_type = _MEDIA_TYPE
        response.content_length = wanted.length
        await response.prepare(request)
        if request.method != "HEAD":
            await _stream(response, file.descriptor, wanted)
        await response.write_eof()
        return response

    async def _flush(self, target_ids: list[str]) -> None:
        """Have written out what is captured; when that can't be had soon, what was written before is served."""
        if target_ids:
            try:
                async with asyncio.timeout(_FLUSH_SECONDS):
                    await self._capturer.refresh(target_ids, flush=True)
            except (TimeoutError, CapturerError):
                return


async def _stream(response: web.StreamResponse, descriptor: int, wanted: Part) -> None:
    loop = asyncio.get_running_loop()
    position = wanted.start
    while position < wanted.end:
        size = min(_CHUNK_BYTES, wanted.end - position)
        data = await loop.run_in_executor(None, os.pread, descriptor, size, position)
        if not data:
            raise ConnectionAbortedError(f"the file ends at byte {position}")  # never a short body that looks whole
        await response.write(data)
        position += len(data)


def _wanted(request: web.Request, size: int, etag: str) -> Part:
    header = request.headers.get("Range")
    condition = request.headers.get("If-Range")
    if condition is not None and condition != etag:
        header = None
    return part(size, header=header, offset=request.query.get("offset"), limit=request.query.get("limit"))


def _etag(uid: str, name: str) -> str:
    """Strong, and the same while the file grows: names are unique and bytes only appended, so a part stays true."""
    return f'"{hashlib.sha256(f"{uid}/{name}".encode()).hexdigest()[:32]}"'


def _names_etag(header: str | None, etag: str) -> bool:
    return header is not None and etag in {value.strip().removeprefix("W/") for value in header.split(",")}


def _uid(request: web.Request) -> str:
    uid = request.match_info["uid"]
    if not names.is_uid(uid):
        raise status.bad_request(f"{uid!r} is no UID")
    return uid


def peer_name(certificate: dict[str, Any]) -> str | None:
    """The one common name in a certificate as `ssl.SSLSocket.getpeercert` tells it; None when it has not one."""
    found = [
        value for part_ in certificate.get("subject", ()) for attribute, value in part_ if attribute == "commonName"
    ]
    return found[0] if len(found) == 1 else None


def has_ended(certificate: dict[str, Any], now: float) -> bool:
    """Whether the certificate's time is over at `now`, in seconds since 1970."""
    return now > ssl.cert_time_to_seconds(certificate["notAfter"])


@web.middleware
async def _apiserver_alone(request: web.Request, handler: Handler) -> web.StreamResponse:
    certificate = request.get_extra_info("peercert")
    # It held when the connection was made, which may be long ago.
    if not certificate or peer_name(certificate) != CLIENT_NAME or has_ended(certificate, time.time()):
        raise status.forbidden(f"only {CLIENT_NAME} may ask")
    return await handler(request)


@web.middleware
async def _as_status(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except status.StatusError as error:
        return _status_response(error, {})
    except web.HTTPException as error:
        return _status_response(status.StatusError(error.status, error.reason), {})


def _status_response(error: status.StatusError, headers: dict[str, str]) -> web.Response:
    return web.json_response(error.to_json(), status=error.code, headers=headers)
