"""A real control plane without nodes or namespaces: etcd and kube-apiserver on loopback, children of a test run."""

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hack.clusters.api import Api
from hack.clusters.binaries import find
from hack.clusters.controlplane import ControlPlane
from hack.clusters.failure import Failure
from hack.clusters.pki import Authority, kubeconfig, write_private
from hack.clusters.ports import free_ports

PATIENCE = 60


@dataclasses.dataclass(frozen=True, slots=True)
class BareControlPlane:
    """What a test needs of it. Users are made up: whoever has a certificate of `authority` is who it says."""

    url: str
    etcd_url: str
    directory: Path
    kubeconfig: Path
    kubectl: Path
    authority: Authority
    front_proxy: Authority

    def kubeconfig_for(self, user: str, *groups: str) -> Path:
        """A kubeconfig that authenticates as this user in these groups."""
        path = self.directory / f"{user.replace(':', '-')}.kubeconfig"
        write_private(path, self._kubeconfig(user, groups))
        return path

    def _kubeconfig(self, user: str, groups: Sequence[str]) -> bytes:
        pair = self.authority.issue(user, groups=groups)
        return kubeconfig(cluster="bare", server=self.url, ca=self.authority.certificate, user=user, pair=pair)


@contextlib.contextmanager
def bare_control_plane(directory: Path, *arguments: str) -> Iterator[BareControlPlane]:
    """Start one that lives as long as the block; Failure, with the log's end, when it does not come up.

    kube-apiserver gets the `arguments` beside its usual ones.

    RBAC and the front proxy are as in the cluster. No controller runs, so nothing makes ServiceAccounts.
    The aggregator routes by cluster address, so an APIService or webhook may name a Service of type ExternalName, which
    leads to a server on loopback.
    """
    port, etcd_port, etcd_peer_port = free_ports(3)
    settings = ControlPlane(
        address="127.0.0.1",
        port=port,
        etcd_port=etcd_port,
        etcd_peer_port=etcd_peer_port,
        etcd_data=directory / "etcd",
        pki=directory / "pki",
    )
    authority, front_proxy = Authority.create("bare"), Authority.create("front-proxy")
    settings.write_certificates(authority, front_proxy)
    plane = BareControlPlane(
        url=settings.url,
        etcd_url=f"http://127.0.0.1:{etcd_port}",
        directory=directory,
        kubeconfig=directory / "admin.kubeconfig",
        kubectl=find("kubectl"),
        authority=authority,
        front_proxy=front_proxy,
    )
    plane.kubeconfig_for("admin", "system:masters")
    more = ["--bind-address=127.0.0.1", "--endpoint-reconciler-type=none", *arguments]
    with contextlib.ExitStack() as programs:
        etcd = programs.enter_context(_running(directory, "etcd", settings.etcd()))
        server = programs.enter_context(_running(directory, "kube-apiserver", [*settings.kube_apiserver(), *more]))
        api = Api(plane.kubeconfig)
        deadline = time.monotonic() + PATIENCE
        while not api.ready():
            for name, process in (("etcd", etcd), ("kube-apiserver", server)):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failure(f"{name} did not come up", log=directory / f"{name}.log")
            time.sleep(0.05)
        yield plane


@contextlib.contextmanager
def _running(directory: Path, program: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    # The death signal ends it when the test run is killed.
    command = ["setpriv", "--pdeathsig=KILL", "--", str(find(program)), *arguments]
    with (directory / f"{program}.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
