"""HTTPS for kube-apiserver: reviews at two paths that nobody else knows.

kube-apiserver shows a webhook no certificate, so whoever reaches it could ask it about any user; a path that can't be
guessed, and that only kube-apiserver's configuration holds, stands in for one.
"""

import base64
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from api.names import WEBHOOK_PATH_KEY, WEBHOOK_PATH_SECRET, is_webhook_path
from kube.client import SECRETS, Client
from kube.connections import Limits
from kube.status import StatusError, bad_request
from kube.watch import Cache
from webhook.admission import Admission
from webhook.review import Answer, Request, ReviewError, parse

LARGEST_BODY = 8 * 2**20
"""Bytes; a review carries the old and the new object, each of at most 3 MiB (kube-apiserver's limit of a request)."""

LIMITS = Limits(body_bytes=2 * LARGEST_BODY)
"""Of a client; it may send more than is read, so that it takes the answer that says so."""


def application(admission: Admission, *, paths: Callable[[], frozenset[str]]) -> web.Application:
    """Reviews are POSTed to `/stamp/PATH` and `/judge/PATH`, PATH being one of `paths()`."""

    def handler(decide: Callable[[Request], Awaitable[Answer]]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(http: web.Request) -> web.Response:
            given = http.match_info["path"].encode()
            if not any(hmac.compare_digest(given, known.encode()) for known in paths()):
                raise StatusError(404, "nothing is served here")
            try:
                request = parse(await http.read())
            except ReviewError as error:
                raise bad_request(str(error)) from error
            return web.json_response((await decide(request)).to_json(request.uid))

        return handle

    app = web.Application(client_max_size=LARGEST_BODY, middlewares=[_errors_as_status])
    app.add_routes(
        [
            web.post("/stamp/{path}", handler(admission.stamp)),
            web.post("/judge/{path}", handler(admission.judge)),
        ]
    )
    return app


def path_cache(client: Client, *, namespace: str) -> Cache[str]:
    """Follow the Secret with the path, which the controller makes."""
    return Cache(client, SECRETS, read_path, namespace=namespace, field_selector=f"metadata.name={WEBHOOK_PATH_SECRET}")


def read_path(secret: dict[str, Any]) -> str:
    """Raises `ValueError`."""
    path = base64.b64decode((secret.get("data") or {}).get(WEBHOOK_PATH_KEY, "")).decode()
    if not is_webhook_path(path):
        raise ValueError(f"its key {WEBHOOK_PATH_KEY} is no path: 16 to 63 lower-case letters and digits")
    return path


@web.middleware
async def _errors_as_status(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except StatusError as error:
        status = error
    except web.HTTPException as error:
        status = StatusError(error.status, error.reason)
    return web.json_response(status.to_json(), status=status.code)
