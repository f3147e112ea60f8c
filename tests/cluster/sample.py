"""The Go sample server (`k8s.io/sample-apiserver`) behind the kube-apiserver of a `World`, for comparison with ours."""

import base64
import json
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hack.clusters.bare import BareControlPlane
from hack.clusters.binaries import find
from hack.clusters.pki import Authority
from hack.clusters.ports import free_port
from kube.client import APISERVICES, Json
from tests.cluster.aggregated import Server, World, eventually

GROUP = "wardle.example.com"
VERSION = "v1alpha1"
RBAC = "rbac.authorization.k8s.io"

_NAME = "sample-apiserver"
_SERVER_NAME = f"{_NAME}.kubepcap.svc"
_APISERVICE = f"{VERSION}.{GROUP}"


@dataclass(frozen=True, slots=True)
class Sample:
    """The server and its process."""

    server: Server
    pid: int


@asynccontextmanager
async def sample_server(
    world: World, directory: Path, *, reviewing: Path, rights: Sequence[Json], flunders: Iterable[str]
) -> AsyncIterator[Sample]:
    """It serves while the block runs, with these objects in the namespace dev.

    `reviewing` is the kubeconfig by which it authenticates and authorizes, `rights` are objects of RBAC.
    """
    authority, port = Authority.create("sample"), free_port()
    authority.issue(_NAME, hosts=[_SERVER_NAME]).write(directory, "sample")
    server = Server("127.0.0.1", port, _SERVER_NAME, authority.certificate.decode())

    async def is_ready() -> bool:
        try:
            return (await server.ask("/readyz")).code == 200
        except ConnectionError:
            return False

    async def is_available() -> bool:
        service = await world.client.get(APISERVICES, _APISERVICE)
        conditions = (service.get("status") or {}).get("conditions") or []
        return any(c["type"] == "Available" and c["status"] == "True" for c in conditions)

    with _running(world.plane, directory, port, reviewing) as pid:
        await eventually(is_ready)
        await _apply(world, [*_services(authority, port), *rights])
        await eventually(is_available)
        await _apply(world, [_flunder(name) for name in flunders])
        yield Sample(server, pid)


@contextmanager
def _running(plane: BareControlPlane, directory: Path, port: int, reviewing: Path) -> Iterator[int]:
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
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield started.pid
    finally:
        started.kill()
        started.wait()


async def _apply(world: World, objects: Sequence[Json]) -> None:
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}).encode()

    async def applied() -> bool:
        code, _, _ = await world.kubectl("apply", "--validate=false", "--filename=-", given=listed)
        return code == 0

    await eventually(applied)


def _services(authority: Authority, port: int) -> list[Json]:
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": _NAME, "namespace": "kubepcap"},
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
        },
        {
            "apiVersion": APISERVICES.api_version,
            "kind": APISERVICES.kind,
            "metadata": {"name": _APISERVICE},
            "spec": {
                "group": GROUP,
                "version": VERSION,
                "groupPriorityMinimum": 100,
                "versionPriority": 15,
                "caBundle": base64.b64encode(authority.certificate).decode(),
                "service": {"name": _NAME, "namespace": "kubepcap", "port": port},
            },
        },
    ]


def _flunder(name: str) -> Json:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "Flunder",
        "metadata": {"name": name, "namespace": "dev"},
    }
