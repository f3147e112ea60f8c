"""Stand-ins for the controller's signer and the nodes' agents, where those are not what a test is about.

They speak the real protocols, over real TLS; unlike the real ones they can fail on demand.
"""

import asyncio
import base64
import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from hack.clusters.pki import Authority
from kube.client import CERTIFICATESIGNINGREQUESTS, Client, Json
from kube.watch import Cache, Key


class Signer:
    """Signs whatever is asked for under our signer names."""

    def __init__(self, client: Client, authority: Authority) -> None:
        self._client = client
        self._authority = x509.load_pem_x509_certificate(authority.certificate)
        key = serialization.load_pem_private_key(authority.pair.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._unsigned: asyncio.Queue[str] = asyncio.Queue()
        self._requests = Cache(client, CERTIFICATESIGNINGREQUESTS, _read_request, on_change=self._changed)

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._requests.run(), name="certificate requests")
            while True:
                await self._sign(await self._unsigned.get())

    def _changed(self, key: Key) -> None:
        request = self._requests.objects.get(key)
        if request and request["spec"]["signerName"].startswith("kubepcap.io/") and not request.get("status"):
            self._unsigned.put_nowait(key.name)

    async def _sign(self, name: str) -> None:
        request = await self._client.get(CERTIFICATESIGNINGREQUESTS, name)
        request["status"] = {"conditions": [{"type": "Approved", "status": "True", "reason": "Test"}]}
        approved = await self._client.replace(CERTIFICATESIGNINGREQUESTS, name, request, subresource="approval")
        certificate = self._certify(base64.b64decode(request["spec"]["request"]), request["spec"]["usages"])
        approved["status"]["certificate"] = base64.b64encode(certificate).decode()
        await self._client.replace(CERTIFICATESIGNINGREQUESTS, name, approved, subresource="status")

    def _certify(self, request: bytes, usages: list[str]) -> bytes:
        asked = x509.load_pem_x509_csr(request)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if "server auth" in usages else ExtendedKeyUsageOID.CLIENT_AUTH
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(asked.subject)
            .issuer_name(self._authority.subject)
            .public_key(asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        for extension in asked.extensions:
            builder = builder.add_extension(extension.value, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass
class Agent:
    """A node's agent with some files.

    With `pause_at`, a download stops at that byte until `go_on` is set, and then breaks off if `dies`.
    """

    files: dict[str, bytes]
    pause_at: int | None = None
    dies: bool = False
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    peers: set[str] = field(default_factory=set)
    uids: set[str] = field(default_factory=set)
    cut_off: int = 0

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [web.get("/captures/{uid}/files", self._list), web.get("/captures/{uid}/files/{name}", self._file)]
        )
        return app

    async def _list(self, request: web.Request) -> web.Response:
        self._remember(request)
        items = [
            {
                "node": "a-node-that-it-is-not",
                "pod": "web-1",
                "interface": "eth0",
                "name": name,
                "size": len(content),
                "packets": 3,
                "dropped": 0,
                "sha256": hashlib.sha256(content).hexdigest(),
                "state": "Finished",
            }
            for name, content in self.files.items()
        ]
        return web.json_response({"items": items})

    async def _file(self, request: web.Request) -> web.StreamResponse:
        self._remember(request)
        content = self.files.get(request.match_info["name"])
        if content is None:
            raise web.HTTPNotFound
        response = web.StreamResponse(headers={"ETag": '"1"', "Kubepcap-Size": str(len(content))})
        response.headers["Kubepcap-Sha256"] = hashlib.sha256(content).hexdigest()
        if request.headers.get("If-None-Match") == '"1"':
            response.set_status(304)
            await response.prepare(request)
            return response
        start, stop = request.http_range.start, request.http_range.stop
        if start is not None:
            if start >= len(content):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
            response.set_status(206)
            response.headers["Content-Range"] = f"bytes {start}-{(stop or len(content)) - 1}/{len(content)}"
        else:
            start = int(request.query.get("offset", "0"))
            stop = start + int(request.query.get("limit", len(content)))
        content = content[start:stop]
        response.content_length = len(content)
        await response.prepare(request)
        if request.method != "HEAD":
            await self._send(request, response, content)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, content: bytes) -> None:
        pause_at = len(content) if self.pause_at is None else self.pause_at
        try:
            await _write(response, content[:pause_at])
            if self.pause_at is not None:
                await self.go_on.wait()
            if self.dies and request.transport is not None:
                request.transport.abort()
                return
            await _write(response, content[pause_at:])
        except ConnectionError:
            self.cut_off += 1

    def _remember(self, request: web.Request) -> None:
        self.uids.add(request.match_info["uid"])
        assert request.transport is not None
        certificate = request.transport.get_extra_info("peercert")
        self.peers |= {value for name in certificate["subject"] for _, value in name}


async def _write(response: web.StreamResponse, content: bytes) -> None:
    for start in range(0, len(content), 65536):
        await response.write(content[start : start + 65536])
        await asyncio.sleep(0)  # a write alone need not let the loop see that the connection is gone


def _read_request(request: Json) -> Json:
    return request
