"""The file server over real mutual TLS, with files on disk and a real capturer for those that grow."""

import asyncio
import hashlib
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest

from agent import serve
from agent.capturer.protocol import State
from agent.capturing import Capturer
from agent.serve import application, peer_name
from agent.store import Store
from hack.clusters.pki import Authority, Pair
from kube.certificates import KeyPair, ServerTLS, client_context
from kube.serve import listening
from tests.agent import world
from tests.agent.test_capturing import eventually
from tests.agent.test_store import CAPTURE, file, name, pcap, status
from tests.agent.world import Pod

SERVER = "node-1.agent.kubepcap"
CONTENT = pcap(8000, size=100)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    url: str
    authority: Authority
    session: aiohttp.ClientSession
    store: Store
    capturer: Capturer

    @property
    def file(self) -> str:
        return f"{self.url}/captures/{CAPTURE}/files/{name()}"

    def get(
        self, url: str, *, method: str = "GET", pair: Pair | None = None, **headers: str
    ) -> "aiohttp.client._RequestContextManager":
        shown = pair or self.authority.issue("kubepcap-apiserver")
        context = client_context(
            ca=self.authority.certificate, key_pair=KeyPair.of(certificate=shown.certificate, key=shown.key)
        )
        named = {header.replace("_", "-"): value for header, value in headers.items()}
        return self.session.request(method, url, headers=named, ssl=context, server_hostname=SERVER)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    authority = Authority.create("kubepcap")
    pair = authority.issue("kubepcap-agent", hosts=[SERVER])
    tls = ServerTLS(client_certificates="required")
    tls.use(
        key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key),
        client_ca=authority.certificate,
    )
    store = Store(tmp_path / "captures", node="node-1", engaged=list)
    capturer = Capturer(tmp_path / "capturer.sock", on_status=store.observe, on_end=lambda _: None)
    async with AsyncExitStack() as stack:
        app = application(store, capturer)
        port = await stack.enter_async_context(listening(app, port=0, host="127.0.0.1", tls=tls, grace=0))
        connector = aiohttp.TCPConnector(force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Server(f"https://127.0.0.1:{port}", authority, session, store, capturer)


@pytest.fixture
async def finished(server: Server, tmp_path: Path) -> Server:
    path = tmp_path / "captures" / CAPTURE / name()
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    server.store.observe(status(file(0, packets=8000, open_=False, size=len(CONTENT)), state=State.STOPPED))
    await server.store.finish(on_record=lambda *_: None)
    return server


async def test_files_are_listed(finished: Server) -> None:
    async with finished.get(f"{finished.url}/captures/{CAPTURE}/files") as response:
        (item,) = (await response.json())["items"]
    assert (item["name"], item["node"], item["size"]) == (name(), "node-1", len(CONTENT))
    assert (item["sha256"], item["state"], item["packets"]) == (SHA256, "Finished", 8000)


async def test_a_capture_without_files_has_an_empty_list(server: Server) -> None:
    async with server.get(f"{server.url}/captures/{CAPTURE}/files") as response:
        assert await response.json() == {"items": []}


async def test_a_file_is_given_whole_with_its_size_and_hash(finished: Server) -> None:
    async with finished.get(finished.file) as response:
        assert response.status == 200
        assert await response.read() == CONTENT
        headers = response.headers
    assert (headers["Content-Length"], headers["Kubepcap-Size"]) == (str(len(CONTENT)),) * 2
    assert headers["Kubepcap-Sha256"] == SHA256
    assert headers["ETag"].startswith('"')


async def test_head_tells_the_same_without_the_bytes(finished: Server) -> None:
    async with finished.get(finished.file, method="HEAD") as response:
        assert (response.status, response.headers["Content-Length"]) == (200, str(len(CONTENT)))
        assert await response.read() == b""


async def test_a_range_is_given(finished: Server) -> None:
    async with finished.get(finished.file, Range="bytes=300000-699999") as response:
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes 300000-699999/{len(CONTENT)}"
        assert await response.read() == CONTENT[300000:700000]


async def test_offset_and_limit_are_given(finished: Server) -> None:
    async with finished.get(f"{finished.file}?offset=24&limit=100") as response:
        assert response.status == 200
        assert await response.read() == CONTENT[24:124]


async def test_a_part_beyond_the_end_is_refused_with_the_size(finished: Server) -> None:
    async with finished.get(f"{finished.file}?offset=99999999") as response:
        assert response.status == 416
        assert response.headers["Content-Range"] == f"bytes */{len(CONTENT)}"
        assert (await response.json())["kind"] == "Status"


async def test_conditions_are_honoured(finished: Server) -> None:
    async with finished.get(finished.file) as response:
        etag = response.headers["ETag"]
    async with finished.get(finished.file, If_None_Match=etag) as response:
        assert response.status == 304
    async with finished.get(finished.file, Range="bytes=0-9", If_Range=etag) as response:
        assert response.status == 206
    async with finished.get(finished.file, Range="bytes=0-9", If_Range='"other"') as response:
        assert (response.status, await response.read()) == (200, CONTENT)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"/captures/{CAPTURE}/files/{name(5)}", 404),
        (f"/captures/{CAPTURE}/files/..%2F..%2Fetc%2Fpasswd", 404),
        (f"/captures/{CAPTURE}/files/{name()}.json", 404),
        ("/captures/..%2F..%2F/files", 400),
        ("/captures/x/files", 400),
        ("/", 404),
    ],
)
async def test_what_is_not_there_is_a_status(finished: Server, path: str, code: int) -> None:
    async with finished.get(f"{finished.url}{path}") as response:
        assert response.status == code
        assert (await response.json())["code"] == code


async def test_only_reading_is_possible(finished: Server) -> None:
    async with finished.get(finished.file, method="DELETE") as response:
        assert response.status == 405


async def test_another_name_in_the_certificate_is_forbidden(finished: Server) -> None:
    for other in (finished.authority.issue("kubepcap-agent"), finished.authority.issue("kubepcap-apiserver2")):
        async with finished.get(finished.file, pair=other) as response:
            assert response.status == 403
            assert (await response.json())["reason"] == "Forbidden"


async def test_a_certificate_of_another_ca_or_a_servers_or_an_expired_one_or_none_gets_no_connection(
    finished: Server,
) -> None:
    strangers = [
        Authority.create("other").issue("kubepcap-apiserver"),
        finished.authority.issue("kubepcap-apiserver", hosts=["x"]),  # server auth
        finished.authority.issue("kubepcap-apiserver", life=timedelta(minutes=-1)),
    ]
    for stranger in strangers:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            async with finished.get(finished.file, pair=stranger) as response:
                await response.read()
    context = client_context(ca=finished.authority.certificate)
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        async with finished.session.get(finished.file, ssl=context, server_hostname=SERVER) as response:
            await response.read()


def test_a_certificate_with_two_names_has_none() -> None:
    assert peer_name({"subject": ((("commonName", "a"),),)}) == "a"
    assert peer_name({"subject": ((("commonName", "a"),), (("commonName", "b"),))}) is None
    assert peer_name({}) is None


async def test_a_certificate_that_ends_while_its_connection_is_kept_is_no_longer_accepted(
    finished: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = finished.authority.issue("kubepcap-apiserver", life=timedelta(days=1))
    key_pair = KeyPair.of(certificate=pair.certificate, key=pair.key)
    context = client_context(ca=finished.authority.certificate, key_pair=key_pair)
    connections = 0

    async def connected(*_: object) -> None:
        nonlocal connections
        connections += 1

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(connected)
    async with aiohttp.ClientSession(trace_configs=[tracing]) as session:
        for days, code in ((0, 200), (2, 403)):
            then = time.time() + days * 86400
            monkeypatch.setattr(serve, "time", SimpleNamespace(time=lambda then=then: then))
            async with session.get(finished.file, ssl=context, server_hostname=SERVER) as response:
                await response.read()
                assert response.status == code
    assert connections == 1


async def test_a_growing_file_can_be_followed_by_offset(
    server: Server, capturer: world.Capturer, pod: Pod, tmp_path: Path
) -> None:
    task = asyncio.create_task(server.capturer.run())
    target = pod.target(capture_uid=CAPTURE)
    server.capturer.want({target.id: target})
    await eventually(lambda: [run.state for run in server.capturer.running()] == [State.CAPTURING])
    async with server.get(f"{server.url}/captures/{CAPTURE}/files") as response:
        (item,) = (await response.json())["items"]
    url = f"{server.url}/captures/{CAPTURE}/files/{item['name']}"
    fetched, etags = b"", set()
    for packets in (10, 20, 30):
        await asyncio.to_thread(pod.receive, 10)
        async with asyncio.timeout(20):
            while len(fetched) < 24 + packets * (16 + world.HEADERS + 64):
                async with server.get(f"{url}?offset={len(fetched)}") as response:
                    assert response.status == 200
                    assert "Kubepcap-Sha256" not in response.headers
                    fetched += await response.read()
                    etags.add(response.headers["ETag"])
    assert len(etags) == 1
    server.capturer.want({})
    await eventually(lambda: not server.capturer.running())
    (path,) = capturer.files(target)
    assert path.read_bytes() == fetched
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
