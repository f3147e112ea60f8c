"""All that proves who is who is replaced while a download runs and requests come, and nobody notices.

Controller, webhook and apiserver are the real programs; the controller's CAs and certificates last seconds. The agent
is a stand-in as far as files go; its certificates are what a real one's are.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from api.names import agent_server_name
from controller.authority import CertificateAuthority, Lifetimes, plan
from controller.bundles import read_authorities
from hack.clusters.bare import bare_control_plane
from hack.clusters.pki import Authority, Pair, write_private
from hack.clusters.ports import free_ports
from kube.certificates import (
    SERVING_SIGNER,
    SERVING_USAGES,
    Identity,
    KeyPair,
    ServerTLS,
    bundle_cache,
    client_context,
    signing_request,
)
from kube.client import (
    APISERVICES,
    CAPTURENODES,
    CONFIGMAPS,
    NAMESPACES,
    PACKETCAPTURES,
    PODS,
    SECRETS,
    Client,
    Json,
    Resource,
)
from kube.serve import listening
from kube.status import StatusError
from tests.apiserver.standins import Agent
from tests.cluster.installation import Installation, Program, eventually
from tests.load import Load
from tests.resumption import RefusedError, Resuming

pytestmark = pytest.mark.asyncio(loop_scope="module")

GROUP = "/apis/subresources.kubepcap.io/v1"
FILES = f"{GROUP}/namespaces/dev/packetcaptures/web/files"
CAPTURES = "/apis/kubepcap.io/v1/namespaces/dev/packetcaptures"
LARGE = "web-1_eth0-20261201T100000.000000000Z-0a1b2c3d-0.pcap"
SMALL = "web-1_eth0-20261201T100001.000000000Z-0a1b2c3d-1.pcap"
SERVER_NAME = "kubepcap-apiserver.kubepcap.svc"
SERVICES = "kubepcap-apiserver", "kubepcap-webhook"
NODE, ADDRESS = "node-1", "127.84.0.1"
AGENT_PORT = 8443
ROLEBINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", namespaced=True)
CLUSTERROLEBINDINGS = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
SERVICE = Resource("", "v1", "services", "Service", namespaced=True)
ALICE = {"X-Remote-User": "alice"}
AUTHENTICATION = "extension-apiserver-authentication"

LIFETIMES = Lifetimes(ca=timedelta(seconds=48), propagation=timedelta(seconds=6), leaf=timedelta(seconds=15))
BLOCK = os.urandom(1 << 20)
BLOCKS = 1000
"""Of the large file: 1.05 GB."""
PACE = 16 << 20
"""Bytes a second that the download takes at most until all is replaced."""
PART = 100
"""Blocks that are downloaded through kube-apiserver, which allows a request 60 s."""
PATIENT = aiohttp.ClientTimeout(total=None, sock_read=30)
RATE = 20


class Generous(Agent):
    """An agent with a file too large to be held in memory; remembers who issued its clients' certificates."""

    def __init__(self) -> None:
        super().__init__({SMALL: b"small"})
        self.issuers: set[str] = set()

    async def _file(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["name"] != LARGE:
            return await super()._file(request)
        response = web.StreamResponse()
        response.content_length = int(request.query.get("limit", BLOCKS * len(BLOCK)))
        await response.prepare(request)
        for _ in range(response.content_length // len(BLOCK)):
            await response.write(BLOCK)
        await response.write_eof()
        return response

    def _remember(self, request: web.Request) -> None:
        super()._remember(request)
        assert request.transport is not None
        certificate = request.transport.get_extra_info("peercert")
        self.issuers |= {value for name in certificate["issuer"] for _, value in name}


@dataclass
class World(Installation):
    agent: Generous = field(default_factory=Generous)
    programs: list[Program] = field(default_factory=list)
    uid: str = ""
    front_proxy: Pair = field(init=False)
    session: aiohttp.ClientSession = field(init=False)
    """As the administrator, who may be anyone."""

    def __post_init__(self) -> None:
        self.front_proxy = self.plane.front_proxy.issue("front-proxy-client")

    async def bundle(self) -> bytes:
        try:
            found = await self.client.get(CONFIGMAPS, "kubepcap-ca", namespace="kubepcap")
        except StatusError:
            return b""
        return str(found["data"]["ca.crt"]).encode()

    async def authorities(self) -> dict[str, CertificateAuthority]:
        return read_authorities(await self.client.get(SECRETS, "kubepcap-ca", namespace="kubepcap"))

    async def issuers(self) -> set[str]:
        """Who issued what our servers show."""
        servers = [("127.0.0.1", port) for port in self.ports.values()] + [(ADDRESS, AGENT_PORT)]
        shown = await asyncio.gather(*(asyncio.to_thread(ssl.get_server_certificate, one) for one in servers))
        return {common_name(x509.load_pem_x509_certificate(pem.encode()).issuer) for pem in shown}

    async def get(self, path: str, *, user: str = "alice") -> tuple[int, bytes]:
        """Ask through kube-apiserver."""
        async with self.session.get(f"{self.plane.url}{path}", headers={"Impersonate-User": user}) as response:
            return response.status, await response.read()

    async def get_directly(
        self, path: str, *, pair: Pair | None = None, method: str = "GET", headers: Mapping[str, str] = {}
    ) -> tuple[int, bytes]:
        """Ask our server as kube-apiserver would, on a connection of its own."""
        pair = pair or self.front_proxy
        key_pair = KeyPair.of(certificate=pair.certificate, key=pair.key)
        context = client_context(ca=await self.bundle(), key_pair=key_pair)
        url = f"https://127.0.0.1:{self.ports['kubepcap-apiserver']}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, headers=headers, ssl=context, server_hostname=SERVER_NAME) as response,
        ):
            return response.status, await response.read()

    async def is_ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError, ValueError):
            return (await self.get_directly("/readyz"))[0] == 200
        return False

    async def is_available(self) -> bool:
        service = await self.client.get(APISERVICES, "v1.subresources.kubepcap.io")
        conditions = (service.get("status") or {}).get("conditions") or []
        return any(c["type"] == "Available" and c["status"] == "True" for c in conditions)

    async def add_agent_pod(self, node: str, address: str) -> str:
        pod = await self.add_pod("kubepcap-agent", "DaemonSet", "kubepcap-agent", node=node, name=f"agent-{node}")
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await self.client.patch(PODS, pod, {"status": status}, namespace="kubepcap", subresource="status")
        return pod

    async def report(self, node: str) -> None:
        """Let the node say that it has files of the capture."""
        said = {"namespace": "dev", "name": "web", "uid": self.uid, "state": "Capturing"}
        body = {
            "apiVersion": CAPTURENODES.api_version,
            "kind": CAPTURENODES.kind,
            "metadata": {"name": node},
            "status": {"reports": [json.dumps(said)]},
        }
        await self.client.create(CAPTURENODES, body)


def common_name(name: x509.Name) -> str:
    return name.rfc4514_string().removeprefix("CN=")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        plane = stack.enter_context(bare_control_plane(tmp_path_factory.mktemp("rotating-plane")))
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=plane.kubeconfig))
        ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
        world = World(plane, client, tmp_path_factory.mktemp("rotation"), ports=ports)
        await world.apply_manifests()
        await client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dev"}})
        await client.create(ROLEBINDINGS, reader("alice"), namespace="dev")
        admin = plane.authority.issue("admin", groups=["system:masters"])
        context = client_context(
            ca=plane.authority.certificate, key_pair=KeyPair.of(certificate=admin.certificate, key=admin.key)
        )
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        world.session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        await start_controller(world, stack)
        for service in SERVICES:
            pod = await world.add_pod(service, "ReplicaSet", f"{service}-5d9c7b8f6")
            kubeconfig = await world.kubeconfig_of(service, pod)
            settings = {"PORT": str(ports[service]), "DRAIN_SECONDS": "0", "GRACE_SECONDS": "1"}
            await start(world, stack, service.removeprefix("kubepcap-"), pod, kubeconfig, **settings)
        await serve_agent(world, stack)
        world.uid = await eventually(lambda: create_capture(world))
        await world.report(NODE)
        await eventually(world.is_ready)
        await eventually(world.is_available)
        yield world


async def start(world: World, stack: AsyncExitStack, module: str, pod: str, kubeconfig: Path, **more: str) -> None:
    program = await world.start(module, pod, kubeconfig, **more)
    stack.push_async_callback(program.stop)
    world.programs.append(program)


async def start_controller(world: World, stack: AsyncExitStack) -> None:
    settings = {
        "CA_LIFETIME_SECONDS": LIFETIMES.ca,
        "CA_PROPAGATION_SECONDS": LIFETIMES.propagation,
        "CERTIFICATE_LIFETIME_SECONDS": LIFETIMES.leaf,
    }
    seconds = {name: str(int(value.total_seconds())) for name, value in settings.items()}
    await start(world, stack, "controller", "controller-0", world.controller_kubeconfig(), **seconds)


async def serve_agent(world: World, stack: AsyncExitStack) -> None:
    """Serve with certificates as `agent.agent` obtains and uses them."""
    kubeconfig = await world.kubeconfig_of("kubepcap-agent", await world.add_agent_pod(NODE, ADDRESS))
    client = await stack.enter_async_context(Client.connect(user_agent="agent", kubeconfig=kubeconfig))
    tls = ServerTLS(client_certificates="required")

    def use(key_pair: KeyPair) -> None:
        tls.use(key_pair=key_pair)

    identity = Identity(
        client,
        signer=SERVING_SIGNER,
        usages=SERVING_USAGES,
        common_name="kubepcap-agent",
        dns_names=[agent_server_name(NODE)],
        on_change=use,
    )
    bundles = bundle_cache(client, namespace="kubepcap", on_change=lambda ca: tls.use(client_ca=ca))
    for name, running in (("agent's certificate", identity.run()), ("agent's CA bundle", bundles.run())):
        stack.callback(asyncio.create_task(running, name=name).cancel)
    app = world.agent.application()
    await stack.enter_async_context(listening(app, host=ADDRESS, port=AGENT_PORT, tls=tls, grace=0))
    await identity.obtained()


def reader(user: str) -> Json:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": ROLEBINDINGS.api_version,
        "kind": ROLEBINDINGS.kind,
        "metadata": {"name": user},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "kubepcap-files-reader"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


def capture(name: str) -> Json:
    metadata = {"name": name}
    return {
        "apiVersion": PACKETCAPTURES.api_version,
        "kind": PACKETCAPTURES.kind,
        "metadata": metadata,
        "spec": {"selector": 'app == "web"'},
    }


async def create_capture(world: World) -> str:
    """Through the webhook, once that has a certificate; the capture's UID."""
    try:
        created = await world.client.create(PACKETCAPTURES, capture("web"), namespace="dev")
    except StatusError:
        return ""
    return str(created["metadata"]["uid"])


Demand = Callable[[CertificateAuthority, x509.CertificateSigningRequest, str], bytes]


def by(
    *, name: str = "", usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH, life: timedelta = LIFETIMES.leaf
) -> Demand:
    """A certificate of our CA, for the node unless another name is given."""

    def signed(authority: CertificateAuthority, request: x509.CertificateSigningRequest, node: str) -> bytes:
        return authority.sign(
            request,
            common_name=agent_server_name(node) if name == "none" else "kubepcap-agent",
            dns_names=[] if name == "none" else [name or agent_server_name(node)],
            usage=usage,
            lifetime=life,
            now=datetime.now(UTC),
        )

    return signed


def by_another_ca(_: CertificateAuthority, request: x509.CertificateSigningRequest, node: str) -> bytes:
    return by()(CertificateAuthority.create(datetime.now(UTC)), request, node)


@asynccontextmanager
async def impostor(world: World, node: str, address: str, demand: Demand) -> AsyncIterator[Agent]:
    """At the address of the node's agent, someone with that certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.load_pem_x509_csr(signing_request(key, "x", []))
    now = datetime.now(UTC)
    signing = plan((await world.authorities()).values(), now, propagation=LIFETIMES.propagation).signing
    assert signing is not None
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    tls = ServerTLS(client_certificates="required")
    key_pair = KeyPair.of(certificate=demand(signing, request, node), key=private)
    tls.use(key_pair=key_pair, client_ca=await world.bundle())
    agent = Agent({SMALL: b"small"})
    async with listening(agent.application(), host=address, port=AGENT_PORT, tls=tls, grace=0):
        yield agent


@pytest.mark.parametrize(
    ("number", "demand", "code"),
    [
        pytest.param(10, by(), 200, id="its own"),
        pytest.param(11, by(name=agent_server_name(NODE)), 503, id="another node's"),
        pytest.param(12, by(name=SERVER_NAME), 503, id="the apiserver's"),
        pytest.param(13, by(name="none"), 503, id="the node only as common name"),
        pytest.param(14, by(usage=ExtendedKeyUsageOID.CLIENT_AUTH), 503, id="a client's"),
        pytest.param(15, by(life=timedelta(seconds=-1)), 503, id="expired"),
        pytest.param(16, by_another_ca, 503, id="another CA's"),
    ],
)
async def test_at_an_agents_address_only_the_certificate_of_that_node_is_accepted(
    world: World, number: int, demand: Demand, code: int
) -> None:
    node, address = f"node-{number}", f"127.84.0.{number}"
    await world.add_agent_pod(node, address)
    async with impostor(world, node, address, demand) as agent:

        async def answer() -> tuple[int, bytes] | None:
            given = await world.get(f"{FILES}/{node}/{SMALL}")
            return given if given[0] != 404 else None  # the pod is not known yet

        status, body = await eventually(answer)
        asked = bool(agent.uids)
    assert status == code, body
    assert asked == (code == 200)
    assert code == 200 or b"did not prove that it is that node's" in body


class Probe:
    """An aggregated API of the test's own: it sees with which certificate kube-apiserver comes."""

    def __init__(self) -> None:
        self.issuer = ""

    async def answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        shown = request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.issuer = common_name(x509.load_der_x509_certificate(shown).issuer)
        return web.json_response({"kind": "APIResourceList", "groupVersion": "probe.example/v1", "resources": []})


@asynccontextmanager
async def probing(world: World, *front_proxies: Authority) -> AsyncIterator[Probe]:
    authority, probe = Authority.create("probe"), Probe()
    pair = authority.issue("probe", hosts=["probe.kubepcap.svc"])
    tls = ServerTLS(client_certificates="required")
    tls.use(
        key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key),
        client_ca=b"".join(one.certificate for one in front_proxies),
    )
    app = web.Application()
    app.router.add_get("/{path:.*}", probe.answer)
    async with listening(app, port=0, tls=tls, grace=0) as port:
        service: Json = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "probe"}}
        service["spec"] = {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}
        await world.client.create(SERVICE, service, namespace="kubepcap")
        spec = {
            "group": "probe.example",
            "version": "v1",
            "groupPriorityMinimum": 1,
            "versionPriority": 1,
            "service": {"name": "probe", "namespace": "kubepcap", "port": port},
            "caBundle": base64.b64encode(authority.certificate).decode(),
        }
        registered: Json = {"apiVersion": APISERVICES.api_version, "kind": APISERVICES.kind, "spec": spec}
        await world.client.create(APISERVICES, registered | {"metadata": {"name": "v1.probe.example"}})
        yield probe
        await world.client.delete(APISERVICES, "v1.probe.example")


async def rotate_front_proxy(world: World, probe: Probe, new: Authority) -> None:
    """As an administrator does it: first both CAs, then the new certificate, then the new CA alone.

    kube-apiserver reads its files anew when they change.
    """
    pki, old = world.plane.directory / "pki", world.plane.front_proxy
    key_pair = KeyPair.of(certificate=world.front_proxy.certificate, key=world.front_proxy.key)
    withdrawn = Resuming(world.ports["kubepcap-apiserver"], SERVER_NAME, await world.bundle(), key_pair)
    assert (await asyncio.to_thread(withdrawn.ask, GROUP, ALICE))[0] != 401
    pair = new.issue("front-proxy-client")
    replace(pki / "front-proxy-ca.crt", old.certificate + new.certificate)

    async def answers_the_new_one() -> bool:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            return (await world.get_directly(GROUP, pair=pair, headers=ALICE))[0] != 401
        return False

    await eventually(answers_the_new_one)
    replace(pki / "front-proxy-client.key", pair.key)
    replace(pki / "front-proxy-client.crt", pair.certificate)
    await seen(probe, "front-proxy-2", lambda: world.get("/apis/probe.example/v1/things", user="system:admin"))
    replace(pki / "front-proxy-ca.crt", new.certificate)
    # kube-apiserver itself never takes a CA out that has not expired.
    alone = {"data": {"requestheader-client-ca-file": new.certificate.decode()}}
    await world.client.patch(CONFIGMAPS, AUTHENTICATION, alone, namespace="kube-system")

    async def refuses_the_old_one() -> bool:
        try:
            return (await asyncio.to_thread(withdrawn.ask, GROUP, ALICE))[0] == 401
        except RefusedError:  # and not since the server refuses whoever comes
            return (await world.get_directly(GROUP, pair=pair, headers=ALICE))[0] != 401

    await eventually(refuses_the_old_one)
    world.front_proxy = pair


async def seen(probe: Probe, issuer: str, ask: Callable[[], Awaitable[object]]) -> None:
    async def shown() -> bool:
        await ask()
        return probe.issuer == issuer

    await eventually(shown)


def replace(path: Path, content: bytes) -> None:
    """In one step, so that nobody reads half a file."""
    draft = path.with_name(f"{path.name}.new")
    write_private(draft, content)
    draft.rename(path)


async def read_slowly(response: aiohttp.ClientResponse, pace: int, replaced: asyncio.Event) -> str:
    """Take what comes, at that pace until all is replaced; its SHA-256."""
    assert response.status == 200
    loop, taken, size = asyncio.get_running_loop(), hashlib.sha256(), 0
    began = loop.time()
    async for chunk in response.content.iter_chunked(len(BLOCK)):
        taken.update(chunk)
        size += len(chunk)
        ahead = began + size / pace - loop.time()
        if ahead > 0 and not replaced.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ahead):
                    await replaced.wait()
    return taken.hexdigest()


async def download(world: World, replaced: asyncio.Event) -> str:
    """The whole large file, on a connection as kube-apiserver makes it."""
    key_pair = KeyPair.of(certificate=world.front_proxy.certificate, key=world.front_proxy.key)
    context = client_context(ca=await world.bundle(), key_pair=key_pair)
    url = f"https://127.0.0.1:{world.ports['kubepcap-apiserver']}{FILES}/{NODE}/{LARGE}"
    async with (
        aiohttp.ClientSession(timeout=PATIENT, headers={"X-Remote-User": "alice"}) as session,
        session.get(url, ssl=context, server_hostname=SERVER_NAME) as response,
    ):
        return await read_slowly(response, PACE, replaced)


async def download_part(world: World, replaced: asyncio.Event) -> str:
    """As much of it as kube-apiserver itself has the time for."""
    url, size = f"{world.plane.url}{FILES}/{NODE}/{LARGE}", PART * len(BLOCK)
    asked, headers = {"limit": str(size)}, {"Impersonate-User": "alice"}
    async with world.session.get(url, params=asked, headers=headers, timeout=PATIENT) as response:
        return await read_slowly(response, size // 30, replaced)


def digest(blocks: int) -> str:
    whole = hashlib.sha256()
    for _ in range(blocks):
        whole.update(BLOCK)
    return whole.hexdigest()


def everyday(world: World) -> Callable[[int], Awaitable[str]]:
    """What people and kube-apiserver ask of us, in turn."""

    async def ask(number: int) -> str:
        if number % 4 == 3:
            url = f"{world.plane.url}{CAPTURES}?dryRun=All"
            async with world.session.post(url, json=capture(f"c{number}")) as response:
                return "" if response.status == 201 else f"create: {response.status} {await response.text()}"
        path = (FILES, f"{FILES}/{NODE}/{SMALL}", GROUP)[number % 4]
        code, body = await world.get(path, user="system:admin" if path == GROUP else "alice")
        if code != 200:
            return f"{path}: {code} {body.decode(errors='replace')}"
        if path == FILES:
            listed = json.loads(body)
            return "" if len(listed["items"]) == 1 and not listed["unanswered"] else f"{path}: {listed}"
        return "" if path == GROUP or body == b"small" else f"{path}: other bytes"

    return ask


async def test_all_that_proves_who_is_who_is_replaced_under_load_and_nobody_notices(world: World) -> None:
    new, replaced = Authority.create("front-proxy-2"), asyncio.Event()
    async with probing(world, world.plane.front_proxy, new) as probe:
        await seen(probe, "front-proxy", lambda: world.get("/apis/probe.example/v1/things", user="system:admin"))
        before = {common_name(ca.certificate.subject) for ca in (await world.authorities()).values()}
        assert await world.issuers() <= before
        world.agent.issuers.clear()

        async def ours_are_replaced() -> bool:
            known = x509.load_pem_x509_certificates(await world.bundle())
            return not (before & ({common_name(ca.subject) for ca in known} | await world.issuers()))

        async with Load(everyday(world), RATE) as load, asyncio.TaskGroup() as tasks:
            downloading = tasks.create_task(download(world, replaced), name="download")
            taking_part = tasks.create_task(download_part(world, replaced), name="download of a part")
            await rotate_front_proxy(world, probe, new)
            await eventually(ours_are_replaced)
            world.agent.issuers.clear()
            at_the_end = load.asked
            replaced.set()

    assert downloading.result() == digest(BLOCKS)
    assert taking_part.result() == digest(PART)
    assert not load.lapses
    assert at_the_end > 20 * RATE
    assert world.agent.issuers
    assert not world.agent.issuers & before
    assert all(program.process.returncode is None for program in world.programs)


async def test_while_nothing_can_be_authorized_no_answer_is_data(world: World) -> None:
    """The last test. kube-apiserver is there, but lets us neither review access nor tokens."""
    name = "kubepcap:apiserver:auth-delegator"
    binding = await world.client.get(CLUSTERROLEBINDINGS, name)
    token = json.loads((await world.kubeconfig_of("kubepcap-apiserver", "kubepcap-apiserver-0")).read_text())
    bearer = {"Authorization": f"Bearer {token['users'][0]['user']['token']}"}
    paths = [
        ("GET", FILES),
        ("GET", f"{FILES}/{NODE}/{SMALL}"),
        ("HEAD", f"{FILES}/{NODE}/{SMALL}"),
        ("GET", GROUP),
        ("GET", f"{GROUP}/namespaces/dev/packetcaptures"),
        ("GET", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files"),
        ("POST", FILES),
        ("GET", "/apis"),
        ("GET", "/openapi/v2"),
        ("GET", "/openapi/v3"),
        ("GET", "/"),
        ("GET", "/nothing"),
    ]
    await world.client.delete(CLUSTERROLEBINDINGS, name)
    users = (f"user-{number}" for number in range(10_000))  # a new one each time, since answers are kept
    # As k8s.io/apiserver: a token that can't be reviewed names nobody.
    refusals = [(500, "InternalError"), (500, "InternalError"), (401, "Unauthorized")]

    async def ask(method: str, path: str) -> list[tuple[int, bytes]]:
        mighty = {"X-Remote-User": next(users), "X-Remote-Group": "system:masters"}
        plain = {"X-Remote-User": next(users)}
        return [await world.get_directly(path, method=method, headers=headers) for headers in (mighty, plain, bearer)]

    try:

        async def fails() -> bool:
            return [code for code, _ in await ask("GET", FILES)] == [code for code, _ in refusals]

        await eventually(fails)
        for method, path in paths:
            for (code, body), (expected, reason) in zip(await ask(method, path), refusals, strict=True):
                assert code == expected, (method, path, body)
                assert method == "HEAD" or json.loads(body)["reason"] == reason
        for path in ("/healthz", "/livez"):
            assert await world.get_directly(path) == (200, b"ok")
        assert (await world.get_directly("/readyz"))[0] == 503

        async def is_refused_behind_kube_apiserver() -> bool:
            code, body = await world.get(FILES)
            assert code in (500, 503) or (code, json.loads(body)["kind"]) == (200, "PacketCaptureFileList")
            return code == 503  # what was answered before is kept for ten seconds, then we are not available

        await eventually(is_refused_behind_kube_apiserver)
    finally:
        del binding["metadata"]["resourceVersion"], binding["metadata"]["uid"]
        await world.client.create(CLUSTERROLEBINDINGS, binding)
    await eventually(world.is_available)
    assert (await world.get(FILES))[0] == 200
