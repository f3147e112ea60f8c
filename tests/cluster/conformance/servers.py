"""Our API server and the Go sample server, side by side behind one kube-apiserver."""

import base64
import http.client
import itertools
import json
import re
import ssl
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hack.clusters.bare import BareControlPlane
from hack.clusters.binaries import find
from hack.clusters.pki import Authority, Pair, kubeconfig
from hack.clusters.ports import free_port
from kube.certificates import KeyPair, ServerTLS
from kube.client import APISERVICES, Json
from tests.cluster.aggregated import Server, World, eventually, installed, write_as_service_account
from tests.cluster.conformance.reviews import Reviews

ALLOWED = "system:conformance"
"""Whoever is in this group may do everything, by RBAC: not `system:masters`, which the Go server asks nobody about."""

_SAMPLE_NAME = "wardle.kubepcap.svc"
_SAMPLE_APISERVICE = "v1alpha1.wardle.example.com"
_RBAC = "rbac.authorization.k8s.io"

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client sees of an answer, as far as two servers of different resources can agree on it."""

    code: int
    reason: str
    content_type: str

    def __str__(self) -> str:
        return " ".join(part for part in (str(self.code), self.reason, self.content_type) if part)

    @property
    def gives(self) -> bool:
        """Whether the client got what it asked for."""
        return 200 <= self.code < 400


NO_CONNECTION = Outcome(0, "", "")


@dataclass
class Side:
    """One of the two servers, with the names that stand for those in a path of the table."""

    server: Server
    reviews: Reviews
    names: dict[str, str]

    def path(self, template: str) -> str:
        """The table's path with the group `{G}`, version `{V}`, resource `{R}`, and `{F}` for our subresource."""
        for name, value in self.names.items():
            template = template.replace(f"{{{name}}}", value)
        return template

    def reviewed(self, user: str) -> list[Json]:
        """What kube-apiserver was asked about the user, in the table's names.

        A selector counts as one, however it is written: the Go server sends it parsed, ours leaves that to
        kube-apiserver, which does it with the same code.
        """
        return [self._in_common_names(spec) for spec in self.reviews.of(user)]

    def _in_common_names(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: bool(item) if key in ("fieldSelector", "labelSelector") else self._in_common_names(item)
                for key, item in value.items()
                if (key, item) != ("subresource", "files")
            }
        if isinstance(value, list):
            return [self._in_common_names(item) for item in value]
        for name in "GVR":
            if isinstance(value, str):
                value = re.sub(rf"(?<![^/]){re.escape(self.names[name])}(?![^/])", f"{{{name}}}", value)
        return value


@dataclass
class Servers:
    world: World
    ours: Side
    theirs: Side
    front_proxy: Pair
    _numbers: defaultdict[str, Iterator[int]] = field(default_factory=lambda: defaultdict(itertools.count))

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.ours, self.theirs

    def new_user(self, kind: str) -> str:
        """A name that no answer is kept for."""
        return f"{kind}-{next(self._numbers[kind])}"

    async def direct(
        self,
        side: Side,
        template: str,
        *,
        method: str = "GET",
        headers: Headers = (),
        certificate: Pair | None = None,
    ) -> Outcome:
        """Ask the server itself."""
        return await _outcome(side.server, side.path(template), method, headers, certificate)

    async def through(self, side: Side, template: str, *, method: str = "GET", headers: Headers = ()) -> Outcome:
        """Ask kube-apiserver; `headers` name the user, whom the admin impersonates."""
        return await _outcome(self.world.kube_apiserver, side.path(template), method, headers, self.world.admin)


async def _outcome(server: Server, path: str, method: str, headers: Headers, certificate: Pair | None) -> Outcome:
    try:
        answer = await server.ask(path, method=method, headers=headers, certificate=certificate)
    except (ssl.SSLError, ConnectionError, http.client.HTTPException):
        return NO_CONNECTION
    content_type = answer.headers.get("Content-Type", "")
    try:
        status = json.loads(answer.body)
    except ValueError:
        status = None
    is_status = isinstance(status, dict) and status.get("kind") == "Status"
    return Outcome(answer.code, status.get("reason", "") if is_status else "", content_type)


@asynccontextmanager
async def side_by_side(plane: BareControlPlane, directory: Path) -> AsyncIterator[Servers]:
    """Both servers, ready and available."""
    authority = Authority.create("reviews")
    async with AsyncExitStack() as stack:

        async def observed(name: str) -> tuple[Reviews, Path]:
            port = free_port()
            pair = authority.issue(name, hosts=["127.0.0.1"])
            tls = ServerTLS(client_certificates="none")
            tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key))
            upstream_ca = plane.authority.certificate
            reviews = await stack.enter_async_context(
                Reviews.observed(plane.url, upstream_ca=upstream_ca, port=port, tls=tls)
            )
            way = directory / f"{name}.kubeconfig"
            url = f"https://127.0.0.1:{port}"
            way.write_bytes(kubeconfig(cluster=name, server=url, ca=authority.certificate, user=name, pair=pair))
            return reviews, way

        our_reviews, our_way = await observed("ours")
        their_reviews, their_way = await observed("theirs")
        world = await stack.enter_async_context(installed(plane, directory, kubeconfig=our_way))
        way = directory / "sample.kubeconfig"
        await write_as_service_account(world, "kubepcap-apiserver", their_way, way)
        sample = await stack.enter_async_context(_sample_server(world, directory, way))
        our_names = {
            "F": "/files",
            "G": "subresources.kubepcap.io",
            "V": "v1",
            "R": "packetcaptures",
        }
        their_names = {
            "F": "",
            "G": "wardle.example.com",
            "V": "v1alpha1",
            "R": "flunders",
        }
        yield Servers(
            world=world,
            ours=Side(world.apiserver, our_reviews, our_names),
            theirs=Side(sample, their_reviews, their_names),
            front_proxy=plane.front_proxy.issue("front-proxy-client"),
        )


@asynccontextmanager
async def _sample_server(world: World, directory: Path, reviewing: Path) -> AsyncIterator[Server]:
    """The Go server; `reviewing` is the kubeconfig by which it authenticates and authorizes."""
    authority = Authority.create("sample")
    port = free_port()
    authority.issue("sample-apiserver", hosts=[_SAMPLE_NAME]).write(directory, "sample")
    server = Server("127.0.0.1", port, _SAMPLE_NAME, authority.certificate.decode())

    async def is_ready() -> bool:
        return (await _outcome(server, "/readyz", "GET", (), None)).code == 200

    async def is_available() -> bool:
        service = await world.client.get(APISERVICES, _SAMPLE_APISERVICE)
        conditions = (service.get("status") or {}).get("conditions") or []
        return any(c["type"] == "Available" and c["status"] == "True" for c in conditions)

    with _running(world.plane, directory, port, reviewing):
        await eventually(is_ready)
        await _apply(world, _objects(authority, port))
        await eventually(is_available)
        await _apply(world, [_flunder("web"), _flunder("other")])
        yield server


@contextmanager
def _running(plane: BareControlPlane, directory: Path, port: int, reviewing: Path) -> Iterator[None]:
    # The death signal ends it when the test run is killed.
    command = [
        "setpriv", "--pdeathsig=KILL", "--", str(find("sample-apiserver")),
        f"--etcd-servers={plane.etcd_url}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--tls-cert-file={directory}/sample.crt",
        f"--tls-private-key-file={directory}/sample.key",
        f"--kubeconfig={plane.kubeconfig}",
        f"--authentication-kubeconfig={reviewing}",
        f"--authorization-kubeconfig={reviewing}",
    ]  # fmt: skip
    with (directory / "sample-apiserver.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def _apply(world: World, objects: Iterable[Json]) -> None:
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}).encode()
    complaint = ""

    async def applied() -> bool:
        nonlocal complaint
        code, _, complaint = await world.kubectl("apply", "--validate=false", "--filename=-", given=listed)
        return code == 0

    await eventually(applied)


def _objects(authority: Authority, port: int) -> list[Json]:
    """The sample server's Service and APIService, and the right to everything for those in `ALLOWED`."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "wardle", "namespace": "kubepcap"},
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
        },
        {
            "apiVersion": APISERVICES.api_version,
            "kind": APISERVICES.kind,
            "metadata": {"name": _SAMPLE_APISERVICE},
            "spec": {
                "group": "wardle.example.com",
                "version": "v1alpha1",
                "groupPriorityMinimum": 100,
                "versionPriority": 15,
                "caBundle": base64.b64encode(authority.certificate).decode(),
                "service": {"name": "wardle", "namespace": "kubepcap", "port": port},
            },
        },
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": ALLOWED},
            "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [
                {"apiGroup": _RBAC, "kind": "Group", "name": ALLOWED},
                *({"apiGroup": _RBAC, "kind": "User", "name": name} for name in allowed_users()),
            ],
        },
    ]


def allowed_users() -> Iterator[str]:
    """Users who may do everything without being in a group; each is asked about once."""
    return (f"allowed-{number}" for number in range(200))


def _flunder(name: str) -> Json:
    return {
        "apiVersion": "wardle.example.com/v1alpha1",
        "kind": "Flunder",
        "metadata": {"name": name, "namespace": "dev"},
    }
