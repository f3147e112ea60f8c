"""TLS whose certificate and trust change while it serves: real handshakes on loopback."""

import ssl
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from hack.clusters.pki import Authority
from kube.certificates import KeyPair, ServerTLS, client_context, read_bundle
from kube.serve import listening

NAME = "node-a.agent.kubepcap"


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


async def test_the_client_checks_the_servers_name(session: aiohttp.ClientSession, servers: Authority) -> None:
    tls = ServerTLS(client_certificates="none")
    tls.use(key_pair=key_pair(servers, "s", ["node-b.agent.kubepcap"]))
    async with listening(app(), port=0, host="127.0.0.1", tls=tls) as port:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(session, port, client_context(ca=servers.certificate))


def test_a_certificate_of_another_key_is_refused(servers: Authority) -> None:
    one, other = servers.issue("a"), servers.issue("a")
    with pytest.raises(ValueError, match="not that of the key"):
        KeyPair.of(certificate=one.certificate, key=other.key)


def test_a_certificate_is_renewed_after_two_thirds_of_its_life(servers: Authority) -> None:
    pair = key_pair(servers, "a")
    assert pair.renew_at - pair.not_before == (pair.not_after - pair.not_before) * 2 / 3


@pytest.mark.parametrize("configmap", [{}, {"data": {}}, {"data": {"ca.crt": ""}}, {"data": {"ca.crt": "x"}}])
def test_a_bundle_without_certificates_is_refused(configmap: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"(?i)pem|certificate"):
        read_bundle(configmap)
