import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from apiserver.aggregation.authentication import Authenticator, FrontProxy, Peer, User, bearer_token, reviewed_user
from apiserver.aggregation.review import ReviewError
from controller.authority import CertificateAuthority
from hack.clusters.pki import Authority as PairAuthority
from kube.certificates import KeyPair, ServerTLS
from kube.client import Client, Json, ObjectList, WatchEvent
from kube.serve import listening
from kube.status import StatusError
from tests.resumption import RefusedError, Resuming

NOW = datetime(2026, 12, 1, tzinfo=UTC)


class Authority:
    """A CA of a front proxy; it issues certificates for ten days around NOW."""

    def __init__(self, name: str = "front-proxy-ca") -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self.issue(name, ca=True)

    def issue(self, *common_names: str, ca: bool = False) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names]))
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=5))
            .not_valid_after(NOW + timedelta(days=5))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


AUTHORITY = Authority()


def front_proxy(**data: str) -> FrontProxy:
    published = {
        "requestheader-client-ca-file": AUTHORITY.pem,
        "requestheader-allowed-names": '["front-proxy-client"]',
        "requestheader-username-headers": '["X-Remote-User"]',
        "requestheader-group-headers": '["X-Remote-Group"]',
        "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
    }
    return FrontProxy.parse({"data": published | data})


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


ALICE = ("X-Remote-User", "alice")


@pytest.mark.parametrize(
    ("given_headers", "expected"),
    [
        ([], None),
        ([("X-Remote-User", "")], None),
        ([("X-Remote-Group", "system:masters")], None),
        ([ALICE], User(name="alice")),
        ([("x-remote-user", "alice")], User(name="alice")),
        ([ALICE, ("X-Remote-User", "bob")], User(name="alice")),
        ([("X-Remote-User", "système:zoé")], User(name="système:zoé")),
        ([ALICE, ("X-Remote-Uid", "42")], User(name="alice", uid="42")),
        ([ALICE, ("X-Remote-Group", "a,b"), ("X-Remote-Group", "c")], User(name="alice", groups=("a,b", "c"))),
        ([ALICE, ("X-Remote-Group", ""), ("X-Remote-Group", "c")], User(name="alice", groups=("c",))),
        ([ALICE, ("X-Remote-Extra-Scopes", "x")], User(name="alice", extra={"scopes": ("x",)})),
        (
            [ALICE, ("X-Remote-Extra-Scopes", "x"), ("x-remote-extra-SCOPES", "y")],
            User(name="alice", extra={"scopes": ("x", "y")}),
        ),
        (
            [ALICE, ("X-Remote-Extra-Authentication.kubernetes.io%2fpod-Name", "p")],
            User(name="alice", extra={"authentication.kubernetes.io/pod-name": ("p",)}),
        ),
        ([ALICE, ("X-Remote-Extra-%C3%A9", "x")], User(name="alice", extra={"é": ("x",)})),
        ([ALICE, ("X-Remote-Extra-50%Zz", "x")], User(name="alice", extra={"50%zz": ("x",)})),
        ([ALICE, ("X-Remote-Extra-", "x")], User(name="alice", extra={"": ("x",)})),
        ([ALICE, ("Impersonate-User", "root"), ("Impersonate-Group", "system:masters")], User(name="alice")),
    ],
)
def test_headers_name_the_user_as_in_kubernetes(given_headers: list[tuple[str, str]], expected: User | None) -> None:
    assert front_proxy().user(headers(*given_headers)) == expected


def test_the_first_of_several_headers_that_has_a_value_counts() -> None:
    proxy = front_proxy(**{"requestheader-username-headers": '["X-Remote-User", "X-User"]'})

    assert proxy.user(headers(("X-Remote-User", ""), ("X-User", "bob"))) == User(name="bob")


def test_groups_of_all_headers_count_in_the_order_of_the_headers() -> None:
    proxy = front_proxy(**{"requestheader-group-headers": '["X-Remote-Group", "X-Group"]'})

    user = proxy.user(headers(ALICE, ("X-Group", "b"), ("X-Remote-Group", "a")))

    assert user == User(name="alice", groups=("a", "b"))


@pytest.mark.parametrize(
    "pair",
    [
        ("X-Remote-User", "a\udce9"),
        ("X-Remote-Group", "a\udce9"),
        ("X-Remote-Uid", "a\udce9"),
        ("X-Remote-Extra-A", "a\udce9"),
        ("X-Remote-Extra-%E9", "a"),
    ],
)
def test_a_name_that_is_not_utf_8_is_refused_rather_than_changed(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="not UTF-8"):
        front_proxy().user(headers(pair, ALICE))


@given(st.lists(st.tuples(st.sampled_from(["X-Remote-Group", "X-Remote-Extra-A%", "X-Other"]), st.text(max_size=20))))
def test_any_headers_name_exactly_the_groups_they_carry(pairs: list[tuple[str, str]]) -> None:
    try:
        user = front_proxy().user(headers(ALICE, *pairs))
    except ValueError:
        return
    assert user is not None
    assert list(user.groups) == [value for name, value in pairs if name == "X-Remote-Group" and value]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"requestheader-client-ca-file": ""}, "without an aggregation layer"),
        ({"requestheader-client-ca-file": "no certificate"}, "PEM"),
        ({"requestheader-allowed-names": "{"}, "requestheader-allowed-names is no list of strings"),
        ({"requestheader-allowed-names": '"name"'}, "requestheader-allowed-names is no list of strings"),
        ({"requestheader-group-headers": "[1]"}, "requestheader-group-headers is no list of strings"),
    ],
)
def test_a_configmap_that_cannot_be_read_is_refused(data: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        front_proxy(**data)


@pytest.mark.parametrize(
    ("names", "common_name", "allowed"),
    [
        (["front-proxy-client"], "front-proxy-client", True),
        (["front-proxy-client"], "admin", False),
        (["front-proxy-client"], "", False),
        (["a", "b"], "b", True),
        ([""], "anyone", False),
        ([" a"], "a", False),
        ([], "anyone", True),
        ([], "", True),
    ],
)
def test_a_front_proxy_needs_an_allowed_name(names: list[str], common_name: str, allowed: bool) -> None:
    assert front_proxy(**{"requestheader-allowed-names": json.dumps(names)}).allows(common_name) is allowed


@pytest.mark.parametrize("published", ["", "null", "[]"])
def test_a_list_that_is_not_there_is_empty(published: str) -> None:
    assert front_proxy(**{"requestheader-allowed-names": published}).allowed_names == ()


def test_the_last_common_name_of_a_certificate_counts_as_in_go() -> None:
    assert Peer(AUTHORITY.issue("first", "last"), frozenset()).common_name == "last"


OTHER = Authority("another-ca")


@pytest.mark.parametrize(
    ("trusted_then", "authorities", "moment", "trusted"),
    [
        pytest.param({AUTHORITY.der}, [AUTHORITY], NOW, True, id="nothing changed"),
        pytest.param({AUTHORITY.der}, [AUTHORITY, OTHER], NOW, True, id="a CA was added"),
        pytest.param({AUTHORITY.der, OTHER.der}, [AUTHORITY], NOW, True, id="another CA was removed"),
        pytest.param({AUTHORITY.der, OTHER.der}, [OTHER], NOW, False, id="its CA was removed"),
        pytest.param({AUTHORITY.der}, [OTHER], NOW, False, id="its CA was replaced"),
        pytest.param({AUTHORITY.der}, [AUTHORITY], NOW + timedelta(days=6), False, id="it has expired"),
        pytest.param({AUTHORITY.der, OTHER.der}, [AUTHORITY, OTHER], NOW + timedelta(days=6), False, id="all expired"),
        pytest.param(set(), [OTHER], NOW, False, id="nothing is known of its verification"),
    ],
)
def test_a_connection_outlives_a_change_of_trust_only_when_its_certificate_does(
    trusted_then: set[bytes], authorities: list[Authority], moment: datetime, trusted: bool
) -> None:
    peer = Peer(AUTHORITY.issue("front-proxy-client"), frozenset(trusted_then))

    assert peer.is_trusted({a.der: a.certificate for a in authorities}, moment) is trusted


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, None),
        ({"authenticated": False, "user": {"username": "alice"}}, None),
        ({"authenticated": "yes", "user": {"username": "alice"}}, None),
        ({"authenticated": True, "user": {"username": "alice"}}, User(name="alice")),
        (
            {"authenticated": True, "user": {"username": "a", "uid": "1", "groups": ["g"], "extra": {"k": ["v"]}}},
            User(name="a", uid="1", groups=("g",), extra={"k": ("v",)}),
        ),
    ],
)
def test_a_token_review_names_a_user_only_when_it_says_so(status: dict[str, object], expected: User | None) -> None:
    assert reviewed_user(status) == expected


def test_a_token_review_without_a_name_is_no_answer() -> None:
    with pytest.raises(ReviewError, match="names no user"):
        reviewed_user({"authenticated": True, "user": {}})


def test_a_token_that_is_refused_with_a_reason_is_an_error_that_is_not_kept() -> None:
    with pytest.raises(StatusError, match="Unauthorized"):
        reviewed_user({"authenticated": False, "error": "[invalid bearer token]"})


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Bearer t", "t"),
        ("bEARER t", "t"),
        ("  Bearer t  ", "t"),
        ("Bearer  t", None),
        ("Bearer t u", "t"),
        ("Bearer\tt", None),
        ("Bearert", None),
        ("Basic t", None),
    ],
)
def test_a_bearer_token_is_read_as_in_kubernetes(header: str, token: str | None) -> None:
    assert bearer_token(header) == token


def test_a_user_weighs_what_their_names_take() -> None:
    light = User(name="alice")
    heavy = User(name="alice", groups=tuple(f"group-{n}" for n in range(10_000)), extra={"k": ("v" * 1000,)})

    assert heavy.weight - light.weight > 100_000


class Publishing(Client):
    """kube-apiserver, as far as it publishes the ConfigMap about front proxies."""

    def __init__(self) -> None:
        self._published: asyncio.Queue[Json] = asyncio.Queue()
        self._version = 0

    def publish(self, client_ca: str) -> None:
        self._version += 1
        metadata = {
            "namespace": "kube-system",
            "name": "extension-apiserver-authentication",
            "resourceVersion": str(self._version),
        }
        data = {"requestheader-client-ca-file": client_ca, "requestheader-username-headers": '["X-Remote-User"]'}
        self._published.put_nowait({"metadata": metadata, "data": data})

    async def pages(self, *_: Any, **__: Any) -> AsyncIterator[ObjectList]:
        yield ObjectList([], "0")

    async def watch(self, *_: Any, **__: Any) -> AsyncIterator[WatchEvent]:
        while True:
            event = WatchEvent("MODIFIED", await self._published.get())
            yield event
            self._published.task_done()

    async def followed(self) -> None:
        """Wait until all that was published has been read."""
        async with asyncio.timeout(10):
            await self._published.join()


def key_pair(authority: PairAuthority, name: str, *hosts: str, years: int = 1) -> KeyPair:
    pair = authority.issue(name, hosts=hosts, life=timedelta(days=365 * years))
    return KeyPair.of(certificate=pair.certificate, key=pair.key)


@dataclass
class World:
    """Our authenticator behind real TLS, with its own clock; it believes the front proxies' CA (for one year)."""

    servers: PairAuthority = field(default_factory=lambda: PairAuthority.create("servers"))
    front_proxies: PairAuthority = field(default_factory=lambda: PairAuthority.create("front-proxies"))
    cluster: Publishing = field(default_factory=Publishing)
    moment: datetime = field(default_factory=lambda: datetime.now(UTC))
    port: int = 0

    async def whoami(self, request: web.Request) -> web.Response:
        try:
            named = await self.authenticator.authenticate(request.headers, request.transport)
        except StatusError as error:
            return web.Response(status=error.code)
        return web.Response(text=named.user.name)

    def __post_init__(self) -> None:
        tls = self.tls = ServerTLS(client_certificates="optional")
        tls.use(key_pair=key_pair(self.servers, "us", "localhost"))
        self.authenticator = Authenticator(
            self.cluster, on_trust=lambda ca: tls.use(client_ca=ca), now=lambda: self.moment
        )

    def front_proxy(self) -> Resuming:
        """With a certificate that outlives its CA."""
        pair = key_pair(self.front_proxies, "front-proxy-client", years=3)
        return Resuming(self.port, "localhost", self.servers.certificate, pair)

    async def trust(self, client_ca: bytes) -> None:
        self.cluster.publish(client_ca.decode())
        await self.cluster.followed()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world, app = World(), web.Application()
    app.router.add_get("/", world.whoami)
    following = asyncio.create_task(world.authenticator.run(), name="following the ConfigMap")
    async with listening(app, port=0, host="127.0.0.1", tls=world.tls, grace=0) as world.port:
        await world.trust(world.front_proxies.certificate)
        yield world
    following.cancel()


async def test_a_session_does_not_outlive_the_withdrawal_of_the_ca(world: World) -> None:
    client = world.front_proxy()
    assert await asyncio.to_thread(client.ask, "/", dict([ALICE])) == (200, b"alice")
    await world.trust(PairAuthority.create("another").certificate)
    with pytest.raises(RefusedError):
        await asyncio.to_thread(client.ask, "/", dict([ALICE]))


async def test_a_comment_beside_the_ca_may_be_in_any_script(world: World) -> None:
    await world.trust("# Öffentliche CA\n".encode() + world.front_proxies.certificate)
    assert await asyncio.to_thread(world.front_proxy().ask, "/", dict([ALICE])) == (200, b"alice")


async def test_when_a_ca_cannot_be_used_the_last_one_stays_in_force(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = PairAuthority.create("another")
    with monkeypatch.context() as broken:
        broken.setattr(world.tls, "use", unusable)
        await world.trust(another.certificate)
    assert await asyncio.to_thread(world.front_proxy().ask, "/", dict([ALICE])) == (200, b"alice")
    await world.trust(PairAuthority.create("a third").certificate)
    with pytest.raises(RefusedError):
        await asyncio.to_thread(world.front_proxy().ask, "/", dict([ALICE]))


def unusable(**_: object) -> None:
    raise ssl.SSLError("not to be used")


@pytest.mark.parametrize(("days", "code"), [(0, 200), (500, 401)])
async def test_a_session_that_is_resumed_holds_as_long_as_the_ca_that_issued_its_certificate(
    world: World, days: int, code: int
) -> None:
    """OpenSSL verifies nothing then, and another CA of those that were trusted is valid still."""
    lasting = CertificateAuthority.create(world.moment, lifetime=timedelta(days=3000))
    await world.trust(world.front_proxies.certificate + lasting.certificate_pem)
    client = world.front_proxy()
    assert await asyncio.to_thread(client.ask, "/", dict([ALICE])) == (200, b"alice")
    world.moment += timedelta(days=days)
    assert (await asyncio.to_thread(client.ask, "/", dict([ALICE])))[0] == code
    assert client.resumed


class KubeAPIServer(Client):
    """Answers TokenReviews from a script, the last one for ever, when the loop has turned a few times."""

    def __init__(self, *answers: Json | StatusError) -> None:
        self.asked = 0
        self._answers = list(answers)

    async def create(self, *_: Any, **__: Any) -> Json:
        self.asked += 1
        for _turn in range(5):
            await asyncio.sleep(0)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, StatusError):
            raise answer
        return {"status": answer}


NAMED: Json = {"authenticated": True, "user": {"username": "alice", "groups": ["devs"]}}
BEARER = headers(("Authorization", "Bearer t"))


def authenticator(*answers: Json | StatusError) -> tuple[Authenticator, KubeAPIServer]:
    server = KubeAPIServer(*answers)
    return Authenticator(server, on_trust=lambda _: None), server


async def test_a_token_is_asked_about_once_however_many_come_with_it() -> None:
    ours, server = authenticator(NAMED)

    named = await asyncio.gather(*(ours.authenticate(BEARER, None) for _ in range(20)))

    assert {each.user.name for each in named} == {"alice"}
    assert named[0].user.groups == ("devs", "system:authenticated")
    assert server.asked == 1
    await ours.authenticate(headers(("Authorization", "Bearer u")), None)
    assert server.asked == 2


async def test_the_token_itself_is_shown_nowhere() -> None:
    ours, _ = authenticator(NAMED)

    assert "'t'" not in repr(await ours.authenticate(BEARER, None))


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        ({"authenticated": False}, 1),
        ({"authenticated": False, "error": "[invalid bearer token]"}, 2),
        ({"authenticated": True, "user": {}}, 2),
        (StatusError(403, "no right to ask"), 2),
        (StatusError(503, "down"), 2),
    ],
)
async def test_a_token_that_names_nobody_is_refused_and_a_failure_is_not_kept(
    answer: Json | StatusError, asked: int
) -> None:
    ours, server = authenticator(answer)

    for _ in range(2):
        with pytest.raises(StatusError, match=r"^Unauthorized$") as raised:
            await ours.authenticate(BEARER, None)
        assert raised.value.code == 401

    assert server.asked == asked


async def test_headers_of_a_front_proxy_mean_nothing_without_one() -> None:
    ours, _ = authenticator(NAMED)

    with pytest.raises(StatusError, match="Unauthorized"):
        await ours.authenticate(headers(ALICE), None)
    named = await ours.authenticate(headers(("X-Remote-User", "root"), ("Authorization", "Bearer t")), None)
    assert named.user.name == "alice"


async def test_a_token_is_confirmed_by_a_review_and_a_front_proxys_word_stands() -> None:
    failure = StatusError(503, "down")
    ours, server = authenticator({"authenticated": True, "user": {"username": "alice"}}, failure)
    named = await ours.authenticate(BEARER, None)

    assert (await ours.confirm(named)).name == "alice"
    assert server.asked == 1, "it was just asked for"
    with pytest.raises(StatusError) as raised:
        await ours.confirm(replace(named, token="another"))
    assert raised.value.code == 500, "nothing can be told of it"
    assert await ours.confirm(replace(named, token=None)) == named.user
