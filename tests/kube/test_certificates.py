"""TLS whose certificate and trust change while it serves: real handshakes on loopback."""

import asyncio
import base64
import itertools
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import cast

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from controller.authority import CertificateAuthority
from hack.clusters.pki import Authority
from kube import certificates
from kube.certificates import Identity, KeyPair, ServerTLS, client_context, read_bundle, signing_request
from kube.client import Client, Json, Resource
from kube.serve import listening
from tests.resumption import RefusedError, Resuming

NAME = "node-a.agent.kubepcap"
START = datetime(2030, 1, 1, tzinfo=UTC)


def key_pair(authority: Authority, name: str, hosts: list[str] | None = None) -> KeyPair:
    pair = authority.issue(name, hosts=hosts or [])
    return KeyPair.of(certificate=pair.certificate, key=pair.key)


@pytest.fixture
def servers() -> Authority:
    return Authority.create("servers")


@pytest.fixture
def clients() -> Authority:
    return Authority.create("clients")


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        yield session


async def whoami(request: web.Request) -> web.Response:
    assert request.transport is not None
    peer = request.transport.get_extra_info("ssl_object").getpeercert() or {}
    subject = {key: value for names in peer.get("subject", ()) for key, value in names}
    return web.json_response(subject.get("commonName"))


def app() -> web.Application:
    app = web.Application()
    app.router.add_get("/", whoami)
    return app


async def ask(session: aiohttp.ClientSession, port: int, context: ssl.SSLContext) -> str | None:
    async with session.get(f"https://127.0.0.1:{port}/", ssl=context, server_hostname=NAME) as response:
        answer: str | None = await response.json()
        return answer


async def test_no_handshake_succeeds_before_there_is_a_certificate(
    session: aiohttp.ClientSession, servers: Authority
) -> None:
    tls = ServerTLS(client_certificates="none")
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        with pytest.raises(aiohttp.ClientError):
            await ask(session, port, client_context(ca=servers.certificate))
        tls.use(key_pair=key_pair(servers, "s", [NAME]))
        assert await ask(session, port, client_context(ca=servers.certificate)) is None


async def test_a_new_certificate_serves_new_connections(
    session: aiohttp.ClientSession, servers: Authority, clients: Authority
) -> None:
    tls = ServerTLS(client_certificates="none")
    tls.use(key_pair=key_pair(servers, "s", [NAME]))
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        await ask(session, port, client_context(ca=servers.certificate))
        renewed = Authority.create("renewed")
        tls.use(key_pair=key_pair(renewed, "s", [NAME]))
        await ask(session, port, client_context(ca=renewed.certificate))
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(session, port, client_context(ca=servers.certificate))


async def test_a_required_client_certificate_is_demanded_and_must_be_of_the_trusted_authority(
    session: aiohttp.ClientSession, servers: Authority, clients: Authority
) -> None:
    tls = ServerTLS(client_certificates="required")
    tls.use(key_pair=key_pair(servers, "s", [NAME]))
    assert not tls.is_usable, "without trust nobody could be let in"
    tls.use(client_ca=clients.certificate)
    ca = servers.certificate
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        assert await ask(session, port, client_context(ca=ca, key_pair=key_pair(clients, "c"))) == "c"
        for refused in (None, key_pair(servers, "c"), key_pair(clients, "c", ["a.server"])):
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await ask(session, port, client_context(ca=ca, key_pair=refused))


async def test_an_optional_client_certificate_may_be_absent_but_not_wrong(
    session: aiohttp.ClientSession, servers: Authority, clients: Authority
) -> None:
    tls = ServerTLS(client_certificates="optional")
    tls.use(key_pair=key_pair(servers, "s", [NAME]), client_ca=clients.certificate)
    ca = servers.certificate
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        assert await ask(session, port, client_context(ca=ca)) is None
        assert await ask(session, port, client_context(ca=ca, key_pair=key_pair(clients, "c"))) == "c"
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await ask(session, port, client_context(ca=ca, key_pair=key_pair(servers, "c")))


async def test_trust_is_exchanged_for_new_connections(
    session: aiohttp.ClientSession, servers: Authority, clients: Authority
) -> None:
    tls = ServerTLS(client_certificates="optional")
    tls.use(key_pair=key_pair(servers, "s", [NAME]), client_ca=clients.certificate)
    context = client_context(ca=servers.certificate, key_pair=key_pair(clients, "c"))
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        assert await ask(session, port, context) == "c"
        tls.use(client_ca=Authority.create("other").certificate)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await ask(session, port, context)


async def test_a_session_does_not_outlive_the_trust_under_which_it_was_made(
    servers: Authority, clients: Authority
) -> None:
    tls = ServerTLS(client_certificates="optional")
    tls.use(key_pair=key_pair(servers, "s", [NAME]), client_ca=clients.certificate)
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        client = Resuming(port, NAME, servers.certificate, key_pair(clients, "c"))
        assert await asyncio.to_thread(client.ask) == (200, b'"c"')
        tls.use(client_ca=Authority.create("other").certificate)
        with pytest.raises(RefusedError):
            await asyncio.to_thread(client.ask)


async def test_the_client_checks_the_servers_name(session: aiohttp.ClientSession, servers: Authority) -> None:
    tls = ServerTLS(client_certificates="none")
    tls.use(key_pair=key_pair(servers, "s", ["node-b.agent.kubepcap"]))
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(session, port, client_context(ca=servers.certificate))


async def test_a_name_that_is_no_servers_does_not_count(session: aiohttp.ClientSession) -> None:
    ca = CertificateAuthority.create(datetime.now(UTC))
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.load_pem_x509_csr(signing_request(key, "x", []))
    usage, now = ExtendedKeyUsageOID.SERVER_AUTH, datetime.now(UTC)
    certificate = ca.sign(request, common_name=NAME, dns_names=[], usage=usage, now=now)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    tls = ServerTLS(client_certificates="none")
    tls.use(key_pair=KeyPair.of(certificate=certificate, key=private))
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(session, port, client_context(ca=ca.certificate_pem))


def test_a_certificate_of_another_key_is_refused(servers: Authority) -> None:
    one, other = servers.issue("a"), servers.issue("a")
    with pytest.raises(ValueError, match="not that of the key"):
        KeyPair.of(certificate=one.certificate, key=other.key)


class Time:
    """A clock that goes as far as is slept, `off` from the signer's, and after `sleeps` sleeps ends it all."""

    def __init__(self, *, off: timedelta = timedelta(), sleeps: int) -> None:
        self.moment = START
        self.off = off
        self._sleeps = sleeps

    def now(self) -> datetime:
        return self.moment + self.off

    async def sleep(self, seconds: float) -> None:
        if not self._sleeps:
            raise EndError
        self._sleeps -= 1
        self.moment += timedelta(seconds=seconds)


class EndError(Exception):
    """The test is over."""


class SigningCluster:
    """kube-apiserver and our signer, which has signed at once; remembers when it was asked."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self._authority = CertificateAuthority.create(START)
        self._certificate = ""
        self.asked: list[timedelta] = []

    async def create(self, _: Resource, body: Json) -> Json:
        self.asked.append(self._time.moment - START)
        certificate = self._authority.sign(
            x509.load_pem_x509_csr(base64.b64decode(body["spec"]["request"])),
            common_name="c",
            dns_names=[],
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            lifetime=timedelta(days=3),
            now=self._time.moment,
        )
        self._certificate = base64.b64encode(certificate).decode()
        return {"metadata": {"name": "csr"}}

    async def get(self, *_: object) -> Json:
        return {"status": {"certificate": self._certificate}}


async def asked_for(time: Time) -> list[timedelta]:
    """When a certificate was asked for, until the time is over."""
    cluster = SigningCluster(time)
    client = cast("Client", cluster)
    identity = Identity(client, signer="s", usages=(), common_name="c", now=time.now, sleep=time.sleep)
    with pytest.raises(EndError):
        await identity.run()
    return cluster.asked


async def test_a_certificate_is_renewed_after_two_thirds_of_its_life() -> None:
    days = [timedelta(days=2 * number) for number in range(3)]
    assert await asked_for(Time(sleeps=2 * 2 * 24 * 60 + 1)) == days


@pytest.mark.parametrize("minutes", [-5, 5])
async def test_a_clock_that_is_five_minutes_off_moves_renewals_by_minutes(minutes: int) -> None:
    _, second = await asked_for(Time(off=timedelta(minutes=minutes), sleeps=2 * 24 * 60 + 10))
    assert abs(second - timedelta(days=2)) < timedelta(minutes=5)


async def test_a_clock_that_was_far_behind_and_is_set_right_renews_soon() -> None:
    class Set(Time):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            self.off = timedelta()

    assert await asked_for(Set(off=timedelta(days=-400), sleeps=1)) == [timedelta(), timedelta(minutes=1)]


async def test_a_clock_that_is_far_ahead_does_not_flood_the_signer() -> None:
    asked = await asked_for(Time(off=timedelta(days=400), sleeps=10))
    pauses = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(asked)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


@pytest.mark.parametrize("configmap", [{}, {"data": {}}, {"data": {"ca.crt": ""}}, {"data": {"ca.crt": "x"}}])
def test_a_bundle_without_certificates_is_refused(configmap: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"(?i)pem|certificate"):
        read_bundle(configmap)


def test_a_bundle_is_read_without_the_comments_in_it(servers: Authority, clients: Authority) -> None:
    authorities = servers.certificate, clients.certificate
    bundle = "# Öffentliche CA\n".join(certificate.decode() for certificate in authorities)
    assert read_bundle({"data": {"ca.crt": bundle}}) == b"".join(authorities)


def test_a_bundle_that_openssl_cannot_use_is_refused(servers: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ssl.SSLError("unknown")

    monkeypatch.setattr(certificates, "client_context", refuse)
    with pytest.raises(ValueError, match="OpenSSL can't use it"):
        read_bundle({"data": {"ca.crt": servers.certificate.decode()}})
