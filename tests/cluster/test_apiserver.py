"""The aggregated API server as a program of its own, behind a real kube-apiserver."""

import asyncio
import base64
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.pki import Authority, Pair
from hack.clusters.ports import free_ports
from kube.certificates import KeyPair, ServerTLS
from kube.client import APISERVICES, CAPTURENODES, CONFIGMAPS, PACKETCAPTURES, PODS, Client, Json, Resource
from kube.serve import listening
from kube.status import StatusError
from tests.apiserver.standins import Agent, Signer

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
GROUP = "/apis/subresources.kubepcap.io/v1"
FILES = f"{GROUP}/namespaces/dev/packetcaptures/web/files"
LARGE = "web-1_eth0-20261201T100000.000000000Z-0a1b2c3d-0.pcap"
SMALL = "web-1_eth0-20261201T100001.000000000Z-0a1b2c3d-1.pcap"
OTHER_UID = "00000000-0000-4000-8000-000000000000"
SERVER_NAME = "kubepcap-apiserver.kubepcap.svc"
CLUSTERROLEBINDINGS = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
# Where the agents listen; that of node-3 shows the certificate of node-1's, and node-4 has none.
ADDRESSES = {"node-1": "127.83.0.1", "node-2": "127.83.0.2", "node-3": "127.83.0.3"}
PATIENCE = 30.0

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


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    """One of its own: the signer here would get in the way of the controller's tests."""
    with bare_control_plane(tmp_path_factory.mktemp("apiserver-plane")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(plane: BareControlPlane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("apiserver")
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
        world.uid = await _create_capture(world, "dev", "web")
        await _create_capture(world, "dev", "other")
        await _create_capture(world, "prod", "web")
        world.process = await _start(world, directory, port, health_port)
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


async def _create_capture(world: World, namespace: str, name: str) -> str:
    """Create a capture, which the nodes then name. node-4 does too, though it has no agent."""
    capture = _object(PACKETCAPTURES.api_version, PACKETCAPTURES.kind, name, namespace)
    created = await world.client.create(PACKETCAPTURES, capture | {"spec": {"selector": "all()"}}, namespace=namespace)
    uid = str(created["metadata"]["uid"])
    for node in (*ADDRESSES, "node-4"):
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


async def _start(world: World, directory: Path, port: int, health_port: int) -> asyncio.subprocess.Process:
    """Start the program with the rights of its ServiceAccount."""
    code, token, err = await world.kubectl("create", "token", "kubepcap-apiserver", "--namespace=kubepcap")
    assert code == 0, err
    config = json.loads(world.plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token.decode().strip()}
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    environment = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "PORT": str(port),
        "HEALTH_PORT": str(health_port),
        "DRAIN_SECONDS": "1",
        "GRACE_SECONDS": "30",
        "DOWNLOADS_PER_USER": "2",
    }
    with world.log.open("wb") as log:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "apiserver", cwd=ROOT, env=environment, stdout=log, stderr=log
        )


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def test_files_of_all_nodes_are_listed_and_nodes_that_did_not_answer_named(world: World) -> None:
    code, out, err = await world.kubectl("get", "--raw", FILES, "--as=alice")

    assert code == 0, err
    listed = json.loads(out)
    assert listed["capture"] == {"namespace": "dev", "name": "web", "uid": world.uid}
    assert [(file["node"], file["name"]) for file in listed["items"]] == [
        ("node-1", LARGE),
        ("node-1", SMALL),
        ("node-2", LARGE),
        ("node-2", SMALL),
    ]
    reasons = {unanswered["node"]: unanswered["message"] for unanswered in listed["unanswered"]}
    assert reasons.keys() == {"node-3", "node-4"}
    assert "did not prove that it is that node's" in reasons["node-3"]
    assert reasons["node-4"] == "node node-4 has no running agent"
    assert "Warning: 2 nodes did not answer, their files are missing: node-3, node-4" in err


async def test_a_listed_url_downloads_the_file(world: World) -> None:
    files = (await world.get(FILES)).json["items"]

    for file in files:
        code, out, err = await world.kubectl("get", "--raw", file["url"], "--as=alice")
        assert code == 0, err
        assert out == world.agents[file["node"]].files[file["name"]]
        assert hashlib.sha256(out).hexdigest() == file["sha256"]


async def test_the_agent_sees_the_apiserver_and_the_uid_of_the_capture(world: World) -> None:
    await world.get(f"{FILES}/node-1/{SMALL}")

    agent = world.agents["node-1"]
    assert agent.peers == {"kubepcap-apiserver"}
    assert world.uid in agent.uids


async def test_the_node_with_another_nodes_certificate_gets_no_request(world: World) -> None:
    answer = await world.get(f"{FILES}/node-3/{SMALL}")

    assert answer.code == 503
    assert "node node-3 did not prove that it is that node's" in answer.message
    assert not world.agents["node-3"].uids


async def test_a_download_says_what_it_is(world: World) -> None:
    content = world.agents["node-2"].files[LARGE]

    answer = await world.get(f"{FILES}/node-2/{LARGE}")

    assert (answer.code, answer.body) == (200, content)
    assert answer.headers["Content-Type"] == "application/vnd.tcpdump.pcap"
    assert answer.headers["Content-Length"] == answer.headers["Kubepcap-Size"] == str(len(content))
    assert answer.headers["Kubepcap-Sha256"] == hashlib.sha256(content).hexdigest()
    assert answer.headers["ETag"] == '"1"'
    assert LARGE in answer.headers["Content-Disposition"]


async def test_a_head_request_gives_the_headers_alone(world: World) -> None:
    answer = await world.get(f"{FILES}/node-2/{LARGE}", method="HEAD")

    assert (answer.code, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == "3000000"


@pytest.mark.parametrize(
    ("query", "headers", "code", "part"),
    [
        ("", [("Range", "bytes=10-19")], 206, slice(10, 20)),
        ("", [("Range", "bytes=2999990-")], 206, slice(2999990, None)),
        ("?offset=100", [], 200, slice(100, None)),
        ("?offset=100&limit=50", [], 200, slice(100, 150)),
        ("?limit=50", [], 200, slice(0, 50)),
        ("", [("If-None-Match", '"1"')], 304, slice(0, 0)),
    ],
)
async def test_a_part_of_a_file_can_be_had(world: World, query: str, headers: Headers, code: int, part: slice) -> None:
    answer = await world.get(f"{FILES}/node-1/{LARGE}{query}", headers=headers)

    assert (answer.code, answer.body) == (code, world.agents["node-1"].files[LARGE][part])


@pytest.mark.parametrize(
    ("path", "headers", "code", "message"),
    [
        (f"{GROUP}/namespaces/dev/packetcaptures/none/files", [], 404, 'packetcaptures.kubepcap.io "none" not found'),
        (f"{FILES}?uid={OTHER_UID}", [], 410, "is another capture now"),
        (f"{FILES}?uid=x", [], 400, "uid must be the UID of the capture"),
        (f"{FILES}/node-1/{SMALL}?uid={OTHER_UID}", [], 410, "is another capture now"),
        (f"{FILES}/node-1/{SMALL.replace('-1.pcap', '-9.pcap')}", [], 404, f"are {LARGE}, {SMALL};"),
        (f"{FILES}/node-9/{SMALL}", [], 404, "files of this capture are on node-1, node-2, node-3, node-4;"),
        (f"{FILES}/node-4/{SMALL}", [], 503, "node node-4 has no running agent at the moment"),
        (f"{FILES}/Node_1/{SMALL}", [], 400, "node: this is no name of a node"),
        (f"{FILES}/node-1/passwd", [], 400, "file: this is no name of a capture file"),
        (f"{FILES}/node-1/{SMALL}?offset=-1", [], 400, "offset must be a number of bytes"),
        (f"{FILES}/node-1/{SMALL}?offset=1", [("Range", "bytes=0-1")], 400, "not both"),
        (f"{FILES}/node-1", [], 404, "could not find the requested resource"),
        (f"{FILES}/node-1/{SMALL}/x", [], 404, "could not find the requested resource"),
    ],
)  # fmt: skip
async def test_a_request_that_cannot_be_met_says_why(
    world: World, path: str, headers: Headers, code: int, message: str
) -> None:
    answer = await world.get(path, headers=headers)

    assert answer.code == code
    assert message in answer.message


async def test_a_part_beyond_the_end_is_refused_with_the_size(world: World) -> None:
    answer = await world.get(f"{FILES}/node-1/{LARGE}", headers=[("Range", "bytes=3000000-")])

    assert (answer.code, answer.headers["Content-Range"]) == (416, "bytes */3000000")
    assert answer.json["kind"] == "Status"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_files_can_only_be_read(world: World, method: str) -> None:
    answer = await world.get(FILES, method=method, user="root")
    assert answer.code in (403, 405)

    answer = await world.get_as_front_proxy(
        FILES, method=method, headers=[("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]
    )
    assert answer.code == 405
    assert "these verbs are: get" in answer.message


@pytest.mark.parametrize(
    ("user", "path", "allowed"),
    [
        ("alice", FILES, True),
        ("alice", f"{FILES}/node-1/{SMALL}", True),
        ("alice", f"{GROUP}/namespaces/prod/packetcaptures/web/files", False),
        ("bob", FILES, True),
        ("bob", f"{GROUP}/namespaces/dev/packetcaptures/other/files", False),
        ("victor", FILES, False),
        ("victor", f"{FILES}/node-1/{SMALL}", False),
        ("nobody", FILES, False),
    ],
)
async def test_native_rbac_decides(world: World, user: str, path: str, allowed: bool) -> None:
    """Asked as kube-apiserver would ask, so that our own review is what refuses."""
    through = await world.get(path, user=user)
    direct = await world.get_as_front_proxy(path, headers=[("X-Remote-User", user)])

    assert (through.code, direct.code) == ((200, 200) if allowed else (403, 403))
    if not allowed:
        assert direct.message == through.message
        assert direct.json["details"] == through.json["details"]


async def test_kubectl_prints_a_refusal_in_the_words_of_kubernetes(world: World) -> None:
    code, _, err = await world.kubectl("get", "--raw", FILES, "--as=victor")

    assert code == 1
    assert (
        'Error from server (Forbidden): packetcaptures.subresources.kubepcap.io "web" is forbidden: User "victor" '
        'cannot get resource "packetcaptures/files" in API group "subresources.kubepcap.io" in the namespace "dev"'
    ) in err


@pytest.mark.parametrize(
    ("user", "namespace", "answer"), [("alice", "dev", "yes"), ("alice", "prod", "no"), ("victor", "dev", "no")]
)
async def test_can_i_answers_truly(world: World, user: str, namespace: str, answer: str) -> None:
    resource = "packetcaptures.subresources.kubepcap.io"
    _, out, err = await world.kubectl(
        "auth", "can-i", "get", resource, "--subresource=files", f"--namespace={namespace}", f"--as={user}"
    )

    assert out.decode().strip() == answer
    assert "Warning" not in err


async def test_kubectl_still_means_the_captures_themselves(world: World) -> None:
    code, out, err = await world.kubectl("get", "packetcaptures", "--namespace=dev", "--output=name")

    assert code == 0, err
    assert out.split() == [b"packetcapture.kubepcap.io/other", b"packetcapture.kubepcap.io/web"]


async def test_openapi_is_merged_into_that_of_kube_apiserver(world: World) -> None:
    path = f"{GROUP}/namespaces/{{namespace}}/packetcaptures/{{name}}/files"

    async def in_version_3() -> bool:
        index = (await world.get("/openapi/v3", user="system:admin", headers=_MASTERS)).json["paths"]
        if "apis/subresources.kubepcap.io/v1" not in index:
            return False
        document = await world.get(
            index["apis/subresources.kubepcap.io/v1"]["serverRelativeURL"], user="system:admin", headers=_MASTERS
        )
        return set(document.json["paths"]) == {path, f"{path}/{{node}}/{{file}}"}

    async def in_version_2() -> bool:
        document = (await world.get("/openapi/v2", user="system:admin", headers=_MASTERS)).json
        return path in document["paths"] and (
            "io.kubepcap.subresources.v1.PacketCaptureFileList" in document["definitions"]
        )

    await eventually(in_version_3)
    await eventually(in_version_2)


async def test_kube_apiserver_logs_no_error_for_the_group(world: World) -> None:
    lines = (world.plane.directory / "kube-apiserver.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("E") and "subresources.kubepcap.io" in line] == []


_GROUPS = [("X-Remote-Group", f"group-{number}") for number in range(3000)]
_MASTERS = [("Impersonate-Group", "system:masters")]


@pytest.mark.parametrize(
    ("common_name", "headers", "code"),
    [
        pytest.param(None, [], 401, id="nobody"),
        pytest.param(None, [("X-Remote-User", "alice")], 401, id="no certificate"),
        pytest.param("someone-else", [("X-Remote-User", "alice")], 401, id="a name that is not allowed"),
        pytest.param("front-proxy-client", [], 401, id="no user"),
        pytest.param("front-proxy-client", [("X-Remote-User", "alice")], 200, id="front proxy"),
        pytest.param("front-proxy-client", [("X-Remote-User", "eve")], 403, id="no right"),
        pytest.param(
            "front-proxy-client",
            [("X-Remote-User", "eve"), ("Impersonate-User", "alice"), ("Impersonate-Group", "system:masters")],
            403,
            id="impersonation means nothing here",
        ),
        pytest.param(
            "front-proxy-client",
            [("X-Remote-User", "eve"), *_GROUPS, ("X-Remote-Group", "system:masters")],
            200,
            id="thousands of groups",
        ),
        pytest.param("front-proxy-client", [("X-Remote-User", "zoé")], 403, id="UTF-8"),
        pytest.param(None, [("Authorization", "Bearer nonsense")], 401, id="a token that is not valid"),
        pytest.param(None, [("Authorization", "Basic YWxpY2U6eA==")], 401, id="a scheme that is not spoken"),
    ],
)  # fmt: skip
async def test_only_the_front_proxy_may_name_a_user(
    world: World, common_name: str | None, headers: Headers, code: int
) -> None:
    certificate = world.plane.front_proxy.issue(common_name) if common_name else None

    answer = await world.apiserver.ask(FILES, headers=headers, certificate=certificate)

    assert answer.code == code, answer.body
    if code == 403:
        assert dict(headers)["X-Remote-User"] in answer.message


async def test_a_certificate_of_another_ca_gets_no_connection(world: World) -> None:
    imposter = Authority.create("front-proxy").issue("front-proxy-client")

    with pytest.raises((ssl.SSLError, ConnectionError)):
        await world.apiserver.ask(FILES, headers=[("X-Remote-User", "alice")], certificate=imposter)


async def test_trust_in_front_proxies_follows_the_configmap(world: World) -> None:
    """kube-apiserver keeps the CAs that it finds in the ConfigMap beside its own."""
    second = Authority.create("second-front-proxy")
    key = "requestheader-client-ca-file"
    name, namespace = "extension-apiserver-authentication", "kube-system"
    published = (await world.client.get(CONFIGMAPS, name, namespace=namespace))["data"][key]

    async def publish(authorities: str) -> None:
        await world.client.patch(CONFIGMAPS, name, {"data": {key: authorities}}, namespace=namespace)

    tls = world.apiserver.tls(second.issue("front-proxy-client"))
    async with aiohttp.ClientSession(headers={"X-Remote-User": "alice"}) as session:

        async def ask() -> int:
            url = f"https://{world.apiserver.address}:{world.apiserver.port}{FILES}"
            try:
                async with session.get(url, ssl=tls, server_hostname=world.apiserver.name) as response:
                    await response.read()
                    return response.status
            except aiohttp.ClientError:
                return 0

        async def is_trusted() -> bool:
            return await ask() == 200

        async def is_refused_on_the_same_connection() -> bool:
            return await ask() == 401

        assert await ask() == 0
        await publish(published + second.certificate.decode())
        await eventually(is_trusted)
        await publish(published)
        await eventually(is_refused_on_the_same_connection)

    answer = await world.get_as_front_proxy(FILES, headers=[("X-Remote-User", "alice")])
    assert answer.code == 200


async def test_a_bearer_token_names_its_user(world: World) -> None:
    _, token, _ = await world.kubectl("create", "token", "kubepcap-agent", "--namespace=kubepcap")
    headers = [("Authorization", f"Bearer {token.decode().strip()}"), ("X-Remote-User", "alice")]

    answer = await world.apiserver.ask(FILES, headers=headers)

    assert answer.code == 403
    assert 'User "system:serviceaccount:kubepcap:kubepcap-agent" cannot get' in answer.message
    assert (await world.apiserver.ask("/apis", headers=headers)).code == 200


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
async def test_health_is_for_everyone(world: World, path: str) -> None:
    answer = await world.apiserver.ask(path)

    assert (answer.code, answer.body) == (200, b"ok")


@pytest.mark.parametrize(
    "tail",
    [
        "files/../../other/files",
        "files/node-1/../../../other/files",
        "./files",
        "files//node-1",
        "files/%2e%2e/%2e%2e/other/files",
        "files/..%2f..%2fother%2ffiles",
        "files/node-1/..%5c..%5cother",
    ],
)
async def test_a_path_of_two_meanings_is_refused_to_everyone(world: World, tail: str) -> None:
    path = f"{GROUP}/namespaces/dev/packetcaptures/web/{tail}"
    root = [("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]

    direct = await world.get_as_front_proxy(path, headers=root)
    through = await world.get(path, user="bob")

    assert direct.code == 400
    assert through.code in (301, 400, 403, 404)
    assert b'"items"' not in through.body


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", f"{GROUP}/proxy/namespaces/dev/packetcaptures/web/files", 404),
        ("GET", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", 405),
        ("POST", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", 405),
        ("DELETE", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", 405),
        ("GET", f"{GROUP}/namespaces/dev/packetcaptures", 404),
        ("GET", f"{GROUP}/packetcaptures/web/files", 404),
        ("GET", "/metrics", 404),
        ("POST", "/apis", 405),
    ],
)
async def test_what_is_not_served_is_refused_even_to_the_mightiest(
    world: World, method: str, path: str, code: int
) -> None:
    root = [("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]

    answer = await world.get_as_front_proxy(path, method=method, headers=root)

    assert (answer.code, answer.json["kind"]) == (code, "Status")


async def test_the_audit_id_is_that_of_kube_apiserver(world: World) -> None:
    answer = await world.get_as_front_proxy(FILES, headers=[("X-Remote-User", "alice"), ("Audit-ID", "b1946ac9-2")])

    assert answer.headers["Audit-ID"] == "b1946ac9-2"
    lines = [json.loads(line) for line in world.log.read_text().splitlines() if "b1946ac9-2" in line]
    assert [(line["user"], line["verb"], line["code"]) for line in lines] == [("alice", "get", 200)]


async def test_a_download_that_the_agent_breaks_off_is_seen_to_be_broken(world: World) -> None:
    agent = world.agents["node-1"]
    agent.pause_at, agent.dies = 1_000_000, True
    agent.go_on.set()
    try:
        code, out, err = await world.kubectl("get", "--raw", f"{FILES}/node-1/{LARGE}", "--as=alice")
        with pytest.raises((http.client.IncompleteRead, ConnectionError, ssl.SSLError)):
            await world.get_as_front_proxy(f"{FILES}/node-1/{LARGE}", headers=[("X-Remote-User", "alice")])
    finally:
        agent.pause_at, agent.dies = None, False
        agent.go_on.clear()

    assert code != 0, (len(out), err)


async def test_a_client_that_goes_away_ends_the_agents_work(world: World) -> None:
    agent = world.agents["node-1"]
    agent.files[LARGE] = os.urandom(50_000_000)
    try:
        async with world.download() as response:
            await response.content.readexactly(100_000)

        async def is_cut_off() -> bool:
            return agent.cut_off > 0

        await eventually(is_cut_off)
    finally:
        agent.files[LARGE] = os.urandom(3_000_000)


async def test_a_user_has_only_so_many_downloads_at_a_time(world: World) -> None:
    agent = world.agents["node-1"]
    agent.pause_at = 1000
    try:
        async with world.download(), world.download():
            refused = await world.get_as_front_proxy(f"{FILES}/node-1/{LARGE}", headers=[("X-Remote-User", "alice")])
            other = await world.get_as_front_proxy(f"{FILES}/node-2/{LARGE}", headers=[("X-Remote-User", "bob")])
            agent.go_on.set()
    finally:
        agent.pause_at = None
        agent.go_on.clear()

    assert (refused.code, refused.headers["Retry-After"]) == (429, "1")
    assert 'user "alice" has 2 downloads under way' in refused.message
    assert other.code == 200


async def test_no_answer_is_given_while_authorization_does_not_work(world: World) -> None:
    name = "kubepcap:apiserver:auth-delegator"
    binding = await world.client.get(CLUSTERROLEBINDINGS, name)
    await world.client.delete(CLUSTERROLEBINDINGS, name)
    try:
        users = iter(range(1000))  # a new one each time, since answers are kept

        async def refused() -> Answer | None:
            headers = [("X-Remote-User", f"user-{next(users)}"), ("X-Remote-Group", "system:masters")]
            answer = await world.get_as_front_proxy(FILES, headers=headers)
            return answer if answer.code == 500 else None

        answer = await eventually(refused)
        assert answer.message.startswith("Internal error occurred: a SubjectAccessReview failed")
        ready = await world.apiserver.ask("/readyz")
        assert (ready.code, ready.body) == (503, b"[-]authorization failed: reason withheld\n")
    finally:
        del binding["metadata"]["resourceVersion"], binding["metadata"]["uid"]
        await world.client.create(CLUSTERROLEBINDINGS, binding)

    await eventually(world.is_ready)


async def test_sigterm_lets_a_download_end_and_takes_no_new_one(world: World) -> None:
    """The last test: the program is gone after it."""
    agent = world.agents["node-2"]
    agent.pause_at = 1_000_000
    async with world.download("node-2") as response:
        start = await response.content.readexactly(1_000_000)
        world.process.send_signal(signal.SIGTERM)

        async def is_not_ready() -> bool:
            return (await world.apiserver.ask("/readyz")).code == 503

        await eventually(is_not_ready)
        during = await world.get_as_front_proxy(f"{FILES}/node-1/{SMALL}", headers=[("X-Remote-User", "bob")])
        agent.go_on.set()
        rest = await response.content.read()

    assert (during.code, during.headers["Connection"]) == (200, "close")
    assert start + rest == agent.files[LARGE]
    async with asyncio.timeout(PATIENCE):
        assert await world.process.wait() == 0
