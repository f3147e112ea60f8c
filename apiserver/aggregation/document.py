"""A JSON document that stays the same while the server runs, with the entity tag that spares sending it again."""

import hashlib
import json
from typing import Any

from aiohttp import hdrs, web


class Document:
    """Serialized once. kube-apiserver fetches such documents every minute and keeps them by their ETag."""

    def __init__(self, content: dict[str, Any], *, content_type: str = "application/json") -> None:
        self._body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        self._content_type = content_type
        self.hash = hashlib.sha512(self._body).hexdigest().upper()

    def respond(self, request: web.Request) -> web.Response:
        """The document, or 304 when the client has it."""
        headers = {hdrs.ETAG: f'"{self.hash}"', hdrs.VARY: hdrs.ACCEPT, hdrs.CACHE_CONTROL: "no-cache"}
        known = request.headers.get(hdrs.IF_NONE_MATCH, "")
        if self.hash in (tag.strip().removeprefix("W/").strip('"') for tag in known.split(",")):
            return web.Response(status=304, headers=headers)
        return web.Response(body=self._body, headers={**headers, hdrs.CONTENT_TYPE: self._content_type})
