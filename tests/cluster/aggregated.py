"""kube-apiserver with our API server behind it as a program of its own, and stand-ins of agents behind that."""

import asyncio
import base64
import http.client
import json
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from hack.clusters.bare import BareControlPlane
from hack.clusters.pki import Authority, Pair
from hack.clusters.ports import free_ports
from kube.certificates import KeyPair, ServerTLS
from kube.client import APISERVICES, CAPTURENODES, PACKETCAPTURES, PODS, Client, Json
from kube.serve import listening
from kube.status import StatusError
from tests.apiserver.standins import Agent, Signer

ROOT = Path(__file__).parents[2]
GROUP = "/apis/subresources.kubepcap.io/v1"
FILES = f"{GROUP}/namespaces/dev/packetcaptures/web/files"
LARGE = "web-1_eth0-20261201T100000.000000000Z-0a1b2c3d-0.pcap"
SMALL = "web-1_eth0-20261201T100001.000000000Z-0a1b2c3d-1.pcap"
SERVER_NAME = "kubepcap-apiserver.kubepcap.svc"
# Where the agents listen; that of node-3 shows the certificate of node-1's, and node-4 has none.
ADDRESSES = {"node-1": "127.83.0.1", "node-2": "127.83.0.2", "node-3": "127.83.0.3"}
PATIENCE = 30.0
MAX_CONNECTIONS = 64

Headers = Iterable[tuple[str, str]]


async def eventually(question: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer; without one in time, the test fails and shows the last."""
    answer: Any = None
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while not (answer := await question()):  # noqa: ASYNC110 - what is waited for is in another process
                await asyncio.sleep(0.1)
    assert answer, f"no true answer in time, the last was {answer!r}"
    return answer


@dataclass
class Answer:
    code: int
    body: bytes
    headers: http.client.HTTPMessage

    @property
    def json(self) -> Json:
        read: Json = json.loads(self.body)
        return read

    @property
    def message(self) -> str:
        """That of a `metav1.Status`."""
        assert self.json["kind"] == "Status"
        return str(self.json["message"])


@dataclass
class Server:
    """An HTTPS server that is asked byte for byte as a test says: no client library may tidy up the path."""

    address: str
    port: int
    name: str
    ca: str

    async def ask(
        self, path: str, *, method: str = "GET", headers: Headers = (), certificate: Pair | None = None
    ) -> Answer:
        return await asyncio.to_thread(self._ask, path, method, headers, certificate)

    def tls(self, certificate: Pair | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca)
        if certificate is not None:
            KeyPair.of(certificate=certificate.certificate, key=certificate.key).load_into(context)
        return context

    def _ask(self, path: str, method: str, headers: Headers, certificate: Pair | None) -> Answer:
        connection = http.client.HTTPConnection(self.name, timeout=PATIENCE)
        plain = socket.create_connection((self.address, self.port), timeout=PATIENCE)
        with self.tls(certificate).wrap_socket(plain, server_hostname=self.name) as connection.sock:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value.encode())
            connection.endheaders()
            response = connection.getresponse()
            answer = Answer(response.status, response.read(), response.headers)
            response.close()
        return answer


@dataclass
class World:
    """What the fixture has set up: kube-apiserver, our server behind it, the agents behind that."""

    client: Client
    plane: BareControlPlane
    kube_apiserver: Server
    admin: Pair
    apiserver: Server
    agents: dict[str, Agent]
    log: Path
    health_port: int
    uid: str = ""
    seen: dict[str, list[str]] = field(default_factory=dict)
    process: asyncio.subprocess.Process = field(init=False)

    async def kubectl(self, *arguments: str, given: bytes = b"") -> tuple[int | None, bytes, str]:
        process = await asyncio.create_subprocess_exec(
            self.plane.kubectl,
            f"--kubeconfig={self.plane.kubeconfig}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate(given)
        return process.returncode, out, err.decode()

    async def is_ready(self) -> bool:
        with suppress(OSError):
            return (await self.apiserver.ask("/readyz")).code == 200
        return False

    async def is_available(self) -> bool:
        service = await self.client.get(APISERVICES, "v1.subresources.kubepcap.io")
        conditions = (service.get("status") or {}).get("conditions") or []
        return any(c["type"] == "Available" and c["status"] == "True" for c in conditions)

    async def get(self, path: str, *, user: str = "alice", method: str = "GET", headers: Headers = ()) -> Answer:
        """Ask through kube-apiserver as some user, whom the admin impersonates."""
        return await self.kube_apiserver.ask(
            path, method=method, headers=[("Impersonate-User", user), *headers], certificate=self.admin
        )

    async def get_as_front_proxy(self, path: str, *, method: str = "GET", headers: Headers = ()) -> Answer:
        """Ask our server as kube-apiserver would."""
        return await self.apiserver.ask(
            path, method=method, headers=headers, certificate=self.plane.front_proxy.issue("front-proxy-client")
        )

    @asynccontextmanager
    async def download(self, node: str = "node-1") -> AsyncIterator[aiohttp.ClientResponse]:
        """A large file on its way to alice, asked for as kube-apiserver would."""
        tls = self.apiserver.tls(self.plane.front_proxy.issue("front-proxy-client"))
        url = f"https://{self.apiserver.address}:{self.apiserver.port}{FILES}/{node}/{LARGE}"
        async with (
            aiohttp.ClientSession(headers={"X-Remote-User": "alice"}) as session,
            session.get(url, ssl=tls, server_hostname=self.apiserver.name) as response,
        ):
            assert response.status == 200
            yield response


@asynccontextmanager
async def installed(
    plane: BareControlPlane,
    directory: Path,
    *,
    program: Sequence[str | Path] = ("-m", "apiserver"),
    kubeconfig: Path | None = None,
) -> AsyncIterator[World]:
    """Everything set up, ready and available, on a control plane of its own; `directory` takes the program's log.

    `kubeconfig` shows the program another way to kube-apiserver; who it is there stays the same.
    """
    authority = Authority.create("kubepcap")
    port, health_port = free_ports(2)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=plane.kubeconfig))
        world = World(
            client=client,
            plane=plane,
            kube_apiserver=Server(
                address="127.0.0.1",
                port=int(plane.url.rpartition(":")[2]),
                name="localhost",
                ca=plane.authority.certificate.decode(),
            ),
            admin=plane.authority.issue("admin", groups=["system:masters"]),
            apiserver=Server("127.0.0.1", port, SERVER_NAME, authority.certificate.decode()),
            agents={},
            log=directory / "apiserver.log",
            health_port=health_port,
        )
        await _install(world, authority)
        signer = asyncio.create_task(Signer(client, authority).run(), name="signer")
        stack.callback(signer.cancel)
        for node, address in ADDRESSES.items():
            agent = world.agents[node] = Agent({LARGE: os.urandom(3_000_000), SMALL: node.encode()})
            await _create_agent_pod(client, node, address)
            proved = "node-1" if node == "node-3" else node
            tls = _agent_tls(authority, proved)
            await stack.enter_async_context(listening(agent.application(), host=address, port=8443, tls=tls, grace=0))
        world.uid = await create_capture(world, "dev", "web")
        await create_capture(world, "dev", "other")
        await create_capture(world, "prod", "web")
        world.process = await _start(world, directory, port, health_port, program, kubeconfig or plane.kubeconfig)
        stack.push_async_callback(_stop, world.process)
        await eventually(world.is_ready)
        await _register(world, authority)
        await eventually(world.is_available)
        yield world


async def _install(world: World, authority: Authority) -> None:
    """What `manifests/` would, but for the Service, which leads to this machine, and for what runs on nodes."""
    documents = [
        document
        for path in ("namespace.yaml", "roles.yaml", "apiserver.yaml")
        for document in yaml.safe_load_all((ROOT / "manifests" / path).read_text())
        if document["kind"] not in ("Service", "Deployment", "NetworkPolicy", "PodDisruptionBudget")
    ]
    documents += [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "manifests" / "crds").iterdir())]
    documents += [
        _object("v1", "Namespace", "dev"),
        _object("v1", "Namespace", "prod"),
        _object("v1", "ServiceAccount", "kubepcap-agent", "kubepcap"),
        _object("v1", "Service", "kubepcap-apiserver", "kubepcap")
        | {"spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": world.apiserver.port}]}},
        _object("v1", "ConfigMap", "kubepcap-ca", "kubepcap") | {"data": {"ca.crt": authority.certificate.decode()}},
        _reader("alice", "dev"),
        _object("rbac.authorization.k8s.io/v1", "Role", "web-files", "dev")
        | {
            "rules": [
                {
                    "apiGroups": ["subresources.kubepcap.io"],
                    "resources": ["packetcaptures/files"],
                    "resourceNames": ["web"],
                    "verbs": ["get"],
                }
            ]
        },
        _reader("bob", "dev", role="Role", named="web-files"),
        _reader("victor", "dev", named="kubepcap-viewer"),
    ]
    listed = {"apiVersion": "v1", "kind": "List", "items": documents}
    code, _, err = await world.kubectl("apply", "--server-side", "--filename=-", given=json.dumps(listed).encode())
    assert code == 0, err
    code, _, err = await world.kubectl(
        "wait",
        "--for=condition=Established",
        "--timeout=30s",
        "crd/packetcaptures.kubepcap.io",
        "crd/capturenodes.kubepcap.io",
    )
    assert code == 0, err


async def _register(world: World, authority: Authority) -> None:
    """Only now, since the errors that kube-apiserver logs are looked at: it logs some before the server is up."""
    service = yaml.safe_load((ROOT / "manifests" / "apiservice.yaml").read_text())
    service["spec"]["caBundle"] = base64.b64encode(authority.certificate).decode()
    service["spec"]["service"]["port"] = world.apiserver.port
    await world.client.create(APISERVICES, service)


def _object(api_version: str, kind: str, name: str, namespace: str | None = None) -> Json:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _reader(user: str, namespace: str, *, role: str = "ClusterRole", named: str = "kubepcap-files-reader") -> Json:
    group = "rbac.authorization.k8s.io"
    return _object(f"{group}/v1", "RoleBinding", f"{user}-{named}", namespace) | {
        "roleRef": {"apiGroup": group, "kind": role, "name": named},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


async def _create_agent_pod(client: Client, node: str, address: str) -> None:
    name = f"kubepcap-agent-{node}"
    labels = {"app.kubernetes.io/name": "kubepcap", "app.kubernetes.io/component": "agent"}
    pod = _object("v1", "Pod", name, "kubepcap")
    pod["metadata"]["labels"] = labels
    pod["spec"] = {
        "nodeName": node,
        "serviceAccountName": "kubepcap-agent",
        "automountServiceAccountToken": False,
        "containers": [{"name": "agent", "image": "kubepcap.invalid/agent"}],
    }
    await client.create(PODS, pod, namespace="kubepcap")
    status = {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    await client.patch(PODS, name, {"status": status}, namespace="kubepcap", subresource="status")


async def create_capture(
    world: World, namespace: str, name: str, *, nodes: Iterable[str] = (*ADDRESSES, "node-4")
) -> str:
    """Create a capture, which the nodes then name. node-4 does too, though it has no agent."""
    capture = _object(PACKETCAPTURES.api_version, PACKETCAPTURES.kind, name, namespace)
    created = await world.client.create(PACKETCAPTURES, capture | {"spec": {"selector": "all()"}}, namespace=namespace)
    uid = str(created["metadata"]["uid"])
    for node in nodes:
        seen = {"namespace": namespace, "name": name, "uid": uid, "state": "Capturing"}
        captures = world.seen.setdefault(node, [])
        captures.append(json.dumps(seen))
        body = _object(CAPTURENODES.api_version, CAPTURENODES.kind, node) | {"status": {"reports": captures}}
        await world.client.apply(CAPTURENODES, node, body, field_manager="test")
        with suppress(StatusError):
            await world.client.apply(CAPTURENODES, node, body, field_manager="test", subresource="status")
    return uid


def _agent_tls(authority: Authority, node: str) -> ServerTLS:
    tls = ServerTLS(client_certificates="required")
    pair = authority.issue("kubepcap-agent", hosts=[f"{node}.agent.kubepcap"])
    tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key), client_ca=authority.certificate)
    return tls


async def _start(
    world: World, directory: Path, port: int, health_port: int, program: Sequence[str | Path], kubeconfig: Path
) -> asyncio.subprocess.Process:
    """Start the program with the rights of its ServiceAccount."""
    own = directory / "kubeconfig"
    await write_as_service_account(world, "kubepcap-apiserver", kubeconfig, own)
    environment = {
        **os.environ,
        "KUBECONFIG": str(own),
        "PORT": str(port),
        "HEALTH_PORT": str(health_port),
        "DRAIN_SECONDS": "1",
        "GRACE_SECONDS": "30",
        "DOWNLOADS_PER_USER": "2",
        "MAX_CONNECTIONS": str(MAX_CONNECTIONS),
    }
    with world.log.open("wb") as log:
        return await asyncio.create_subprocess_exec(
            sys.executable, *program, cwd=ROOT, env=environment, stdout=log, stderr=log
        )


async def write_as_service_account(world: World, name: str, kubeconfig: Path, target: Path) -> None:
    """Write the kubeconfig to `target` with a ServiceAccount of ours in place of its user."""
    code, token, err = await world.kubectl("create", "token", name, "--namespace=kubepcap")
    assert code == 0, err
    _write_with_token(kubeconfig, token.decode().strip(), target)


def _write_with_token(kubeconfig: Path, token: str, target: Path) -> None:
    config = json.loads(kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    target.write_text(json.dumps(config))


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()
