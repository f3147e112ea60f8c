"""Requests that nobody would think of, to the real API server: what it promises in OpenAPI, and what it must never do.

A few thousand requests, the same in each run. `KUBEPCAP_FUZZ=100000` makes that many, and other ones each time.
"""

import asyncio
import http.client
import itertools
import json
import os
import random
import re
import socket
import ssl
import string
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from hack.benchmarks.process import rss
from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.pki import Pair
from tests.cluster.aggregated import FILES, GROUP, LARGE, PATIENCE, SMALL, Server, World, installed

pytestmark = pytest.mark.asyncio(loop_scope="module")

MANY = int(os.environ.get("KUBEPCAP_FUZZ", "0"))
CONNECTIONS = MANY // 6 or 300
CASES = MANY // 60 or 50
FUZZED = settings(
    database=None,
    deadline=None,
    derandomize=not MANY,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
# A leak of 16 KiB a request would be seen; caches of a bounded size need more where very many things are tried.
MOST_GROWTH = (64 if MANY else 8) << 20
HEALTH = ("/healthz", "/livez", "/readyz")
# Those for which Kubernetes has no reason of its own.
WITHOUT_REASON = {412, 416, 431, 505}
INTERNALS = re.compile(rb"Traceback|File \"|site-packages|[a-z_]+\.py\b|/app/|/usr/|/root/|/home/|0x[0-9a-f]{8,}")


@dataclass(frozen=True)
class Request:
    """One as it goes over the wire; `reusable` says that the connection is in step after its answer."""

    method: bytes
    target: bytes
    version: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def raw(self) -> bytes:
        lines = [b" ".join((self.method, self.target, self.version)), *(b": ".join(pair) for pair in self.headers)]
        return b"\r\n".join([*lines, b"", self.body])

    @property
    def reusable(self) -> bool:
        framing = {b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"}
        return not self.body and not framing & {name.strip().lower() for name, _ in self.headers}


@dataclass
class Answer:
    code: int
    headers: http.client.HTTPMessage
    body: bytes
    closes: bool


@dataclass
class Tally:
    """What came back, over all the examples of a test."""

    codes: Counter[int] = field(default_factory=Counter)

    def __str__(self) -> str:
        return ", ".join(f"{count} × {code}" for code, count in sorted(self.codes.items()))


_CHANCE = random.Random(None if MANY else 0)  # noqa: S311 - for tests


def made_up(alphabet: bytes, *, longest: int = 12) -> list[bytes]:
    """Strings that mean nothing; in Hypothesis's own strategies most of the time would go into making them."""
    lengths = [_CHANCE.randint(1, longest) for _ in range(300)]
    return [b"", *(bytes(_CHANCE.choices(alphabet, k=length)) for length in lengths)]


def either(*likely: bytes | str, rarely: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Mostly one of the former."""
    known = [value.encode() if isinstance(value, str) else value for value in likely]
    return st.sampled_from([*known, *known * (5 * len(rarely) // len(known)), *rarely])


TOKEN = made_up(f"{string.ascii_letters}{string.digits}!#$%&'*+-.^_`|~".encode())[1:]
TEXT = made_up(bytes(range(33, 127)))
BYTES = made_up(bytes(range(256)), longest=20)
EXTRA = [b"X-Remote-Extra-" + key for key in TOKEN]
NUMBERS = [str(number) for number in (0, 5, 1, -1, 3_000_000, 4_000_000, 2**31, 2**63, 10**18, 10**30)]
ANY = st.sampled_from(BYTES)

METHOD = either("GET", "GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", rarely=TOKEN)
SEGMENT = either(
    "apis", "api", "v1", "subresources.kubepcap.io", "namespaces", "dev", "prod", "packetcaptures", "web", "other",
    "files", "node-1", "node-3", "node-4", "node-9", SMALL, LARGE, "watch", "proxy", "status", "finalize", "openapi",
    "v2", "v3", "healthz", "metrics", "", ".", "..", "%2e%2e", "%2F", "%00", "%zz", "a%20b", "..;", "~", "a" * 300,
    rarely=TEXT,
)  # fmt: skip
KNOWN_PATH = either(
    FILES, f"{FILES}/node-1/{SMALL}", f"{FILES}/node-1/{LARGE}", f"{FILES}/node-4/{SMALL}", f"{FILES}/node-9/{SMALL}",
    f"{FILES}/node-1/{SMALL.replace('-1.pcap', '-9.pcap')}", f"{GROUP}/namespaces/prod/packetcaptures/web/files",
    f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", f"{GROUP}/proxy/namespaces/dev/packetcaptures/web/files",
    f"{GROUP}/namespaces/dev/packetcaptures", GROUP, "/apis/subresources.kubepcap.io", "/apis", "/", "/openapi/v2",
    "/openapi/v3", f"/openapi/v3{GROUP}", "/version", "/metrics", *HEALTH,
    rarely=TEXT,
)  # fmt: skip
PATH = (
    KNOWN_PATH
    | KNOWN_PATH.map(bytes)  # for more of these than of the others
    | st.builds(lambda known, tail: b"/".join([known, *tail]), KNOWN_PATH, st.lists(SEGMENT, max_size=3))
    | st.lists(SEGMENT, max_size=12).map(lambda segments: b"/" + b"/".join(segments))
)
QUERY = st.lists(
    st.tuples(
        either(
            "uid", "offset", "limit", "offset", "limit", "watch", "fieldSelector", "labelSelector", "timeout",
            "timeoutSeconds", "resourceVersion", "pretty", "as", rarely=TEXT,
        ),
        either(
            *NUMBERS, "", "true", "00000000-0000-4000-8000-000000000000", "metadata.name=web", "metadata.name%3Dweb",
            "a in (", "a,b!=c", "!", "%D9%A3", "%ff", "9" * 3000, rarely=TEXT,
        ),
    ).map(b"=".join),
    max_size=3,
).map(b"&".join)  # fmt: skip
TARGET = st.builds(lambda path, query: path + b"?" + query if query else path, PATH, QUERY)
IDENTITY = st.tuples(
    either("X-Remote-Group", "X-Remote-Uid", "Impersonate-User", "Impersonate-Group", "X-Remote_User", rarely=EXTRA),
    either("system:masters", "system:authenticated", "a,b", rarely=TEXT),
)
USER = st.tuples(
    st.sampled_from([b"X-Remote-User", b"x-remote-user"]),
    either("alice", "alice", "bob", "victor", "", "zoé", "a" * 3000, b"\xff", rarely=TEXT),
)
RANGE = st.tuples(
    st.just(b"Range"),
    either(
        "bytes=0-3", "bytes=0-", "bytes=-5", "bytes=99999999-", "bytes=-", "bytes=0-1,4-5", "bytes=5-0", "lines=1-2",
        *(f"bytes={number}-{number}" for number in NUMBERS), rarely=TEXT,
    ),
)  # fmt: skip
PLAIN = st.tuples(
    either(
        "Accept", "Accept", "Accept-Encoding", "If-None-Match", "If-Range", "If-Match", "Cookie", "Audit-ID",
        "Authorization", "Host", "Content-Type", "X-Forwarded-For", "X-HTTP-Method-Override", rarely=TOKEN,
    ),
    either(
        "*/*", "gzip", '"1"', "*", "Bearer", "Bearer ", "Bearer x", "Basic eDp5", "text/html", "a;b;c==;=", ";;,,=",
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList", "application/yaml",
        "application/com.github.proto-openapi.spec.v2.v1.0+protobuf", rarely=TEXT,
    ),
)  # fmt: skip
HEADER = IDENTITY | USER | RANGE | PLAIN
FRAMING = st.tuples(
    either(
        "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Expect", "Sec-WebSocket-Key",
        "Content-Encoding", rarely=TOKEN,
    ),
    either(
        "0", "5", "-1", "5, 6", "chunked", "gzip, chunked", "close", "keep-alive", "upgrade", "websocket", "h2c",
        "100-continue", "9" * 30, b"\x0b5", rarely=BYTES,
    ),
)  # fmt: skip
ALICE = ((b"Host", b"localhost"), (b"X-Remote-User", b"alice"))
WELL_FORMED = st.builds(
    Request,
    method=METHOD,
    target=TARGET,
    version=st.just(b"HTTP/1.1"),
    headers=st.lists(HEADER, max_size=3).map(lambda pairs: (*ALICE, *pairs)),
    body=st.just(b""),
)
ODD = st.builds(
    Request,
    method=METHOD,
    target=TARGET
    | either("*", "https://localhost/apis", "localhost:443", "//apis", "apis", "http://[::1", "/é", rarely=BYTES),
    version=either("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "", "HTTP/1.1 ", rarely=BYTES),
    headers=st.lists(HEADER | FRAMING | st.tuples(ANY, ANY), max_size=3).map(lambda pairs: (*ALICE, *pairs)),
    body=ANY,
)
CONVERSATION = st.builds(
    lambda well_formed, odd: [*well_formed, *odd], st.lists(WELL_FORMED, max_size=8), st.lists(ODD, max_size=1)
)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    with bare_control_plane(tmp_path_factory.mktemp("fuzz-plane")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(plane: BareControlPlane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with installed(plane, tmp_path_factory.mktemp("fuzz")) as made:
        yield made


def converse(server: Server, tls: ssl.SSLContext, conversation: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
    """Send the requests on one connection, for as long as the server keeps it and both are in step."""
    plain = socket.create_connection((server.address, server.port), timeout=PATIENCE)
    with closing(tls.wrap_socket(plain, server_hostname=server.name)) as connection:
        for request in conversation:
            connection.sendall(request.raw)
            with closing(http.client.HTTPResponse(connection, method=request.method.decode("latin-1"))) as response:
                response.begin()
                answer = Answer(response.status, response.msg, response.read(), response.will_close)
            yield request, answer
            if answer.closes or not request.reusable:
                return


def complaints(request: Request, answer: Answer) -> list[str]:
    """What is wrong with an answer, whatever was asked."""
    kind = answer.headers.get_content_type()
    found = []
    if kind != "application/vnd.tcpdump.pcap" and INTERNALS.search(answer.body):
        found.append("it shows something of the inside")
    if answer.code >= 500 and answer.code not in (503, 505):
        found.append("nothing was wrong with the server")
    if (answer.code == 401) != ("WWW-Authenticate" in answer.headers):
        found.append("401 says how to authenticate, and nothing else does")
    if request.method == b"HEAD" and answer.body:
        found.append("HEAD is answered with a body")
    if answer.code >= 400 and request.method != b"HEAD":
        found += [f"a failure as {kind}"] if kind != "application/json" else not_a_status(answer)
    return found


def not_a_status(answer: Answer) -> list[str]:
    """What is wrong with a failure's body."""
    found = []
    status = json.loads(answer.body)
    if (status["kind"], status["apiVersion"], status["code"]) != ("Status", "v1", answer.code):
        found.append("it is no Status of this code")
    if not status["message"]:
        found.append("it does not say what is wrong")
    if bool(status["reason"]) == (answer.code in WITHOUT_REASON):
        found.append("it has no reason")
    if answer.code == 503 and not re.search(r"^(node|the agent of node) node-", status["message"]):
        found.append("no agent was missing")
    return found


def fuzz(world: World, certificate: Pair | None, *, connections: int, refuses: bool = False) -> Tally:
    """Hold so many conversations. With `refuses`, nothing but health may be had."""
    tally, tls = Tally(), world.apiserver.tls(certificate)

    @settings(FUZZED, max_examples=connections)
    @given(CONVERSATION)
    def hold(conversation: list[Request]) -> None:
        for request, answer in converse(world.apiserver, tls, conversation):
            tally.codes[answer.code] += 1
            wrong = complaints(request, answer)
            if refuses and answer.code < 400 and not request.target.startswith(tuple(map(str.encode, HEALTH))):
                wrong.append("it was answered to nobody")
            assert not wrong, (wrong, request.raw, answer.code, dict(answer.headers), answer.body[:500])

    hold()
    return tally


async def test_no_request_draws_out_more_than_a_status(world: World) -> None:
    certificate = world.plane.front_proxy.issue("front-proxy-client")
    await asyncio.to_thread(fuzz, world, certificate, connections=CONNECTIONS // 3)
    warm = rss(world.process.pid)

    tally = await asyncio.to_thread(fuzz, world, certificate, connections=CONNECTIONS)

    grown = rss(world.process.pid) - warm
    print(tally, f"{warm >> 20} MiB resident, {grown >> 10} KiB more at the end")  # noqa: T201 - for whoever runs it long
    assert {200, 400, 403, 404} <= tally.codes.keys(), tally
    assert grown < MOST_GROWTH
    assert (await world.apiserver.ask("/readyz")).code == 200


async def test_without_a_certificate_no_request_is_answered_but_health(world: World) -> None:
    tally = await asyncio.to_thread(fuzz, world, None, connections=CONNECTIONS // 2, refuses=True)

    assert {200, 400, 401} <= tally.codes.keys(), tally


class Through(HTTPAdapter):
    """Connects to an address that the certificate does not name."""

    def __init__(self, server: Server, **options: Any) -> None:
        self._name = server.name
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options, server_hostname=self._name, assert_hostname=self._name)


async def test_every_answer_is_one_that_openapi_describes(world: World, tmp_path: Path) -> None:
    document = (
        await world.get(f"/openapi/v3{GROUP}", user="system:admin", headers=[("Impersonate-Group", "system:masters")])
    ).json
    pair = world.plane.front_proxy.issue("front-proxy-client")
    pair.write(tmp_path, "client")
    (tmp_path / "ca.crt").write_text(world.apiserver.ca)

    tally = await asyncio.to_thread(conform, world, document, tmp_path)

    assert {200, 206, 304, 400, 404, 410, 416, 503} <= tally.codes.keys(), tally


def known(uid: str) -> Iterator[tuple[dict[str, str], dict[str, Any], dict[str, str]]]:
    """Paths of what there is or could be, with each query and headers that may be asked of it."""
    whole: dict[str, str] = {"namespace": "dev", "name": "web", "node": "node-1", "file": LARGE}
    other = SMALL.replace("-1.pcap", "-9.pcap")
    near = [{"file": SMALL}, {"file": other}, *({"node": node} for node in ("node-3", "node-4", "node-9"))]
    for change in [{}, *near, {"name": "none"}, {"namespace": "none"}]:
        yield whole | change, {}, {}
    for wanted in (uid, "00000000-0000-4000-8000-000000000000", "x"):
        yield whole, {"uid": wanted}, {}
    for offset, limit in itertools.product((0, 5, 4_000_000, -1), (0, 7, "all")):
        yield whole, {"offset": offset, "limit": limit}, {}
    for part in ("bytes=0-3", "bytes=-2", "bytes=9999999-", "lines=1-2"):
        yield whole, {}, {"Range": part}
        yield whole, {}, {"Range": part, "If-Range": '"1"'}
    yield whole, {"offset": 1}, {"Range": "bytes=0-3"}
    yield whole, {}, {"If-None-Match": '"1"'}


def conform(world: World, document: dict[str, Any], directory: Path) -> Tally:
    """Ask for what is known, and for what OpenAPI makes up, in its terms and beside them."""
    tally = Tally()
    schema = schemathesis.openapi.from_dict(document, config=schemathesis.Config())
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == sum(len(methods) for methods in document["paths"].values())
    url = f"https://{world.apiserver.address}:{world.apiserver.port}"
    tls: dict[str, Any] = {
        "verify": str(directory / "ca.crt"),
        "cert": (str(directory / "client.crt"), str(directory / "client.key")),
    }
    with requests.Session() as session:
        session.mount("https://", Through(world.apiserver))

        def call(case: schemathesis.Case[Any]) -> None:
            response = case.call(base_url=url, session=session, headers={"X-Remote-User": "alice"}, **tls)
            tally.codes[response.status_code] += 1
            case.validate_response(
                response,
                checks=[
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_headers_conformance,
                    checks.response_schema_conformance,
                ],
            )

        for operation in operations:
            for path, query, headers in known(world.uid):
                named = {name: value for name, value in path.items() if f"{{{name}}}" in operation.path}
                call(operation.Case(path_parameters=named, query=query, headers=headers))
            for mode in schemathesis.GenerationMode:
                settings(FUZZED, max_examples=CASES)(given(operation.as_strategy(generation_mode=mode))(call))()
    return tally
