"""The control plane's programs and their settings: what the two-node cluster and the tests' bare one have in common."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hack.clusters.cluster import API_SERVICE, SERVICES
from hack.clusters.pki import Authority, service_account_keys, write_private

AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


@dataclasses.dataclass(frozen=True, slots=True)
class ControlPlane:
    """Where a control plane listens and keeps its files. `address` is an IP address that its clients reach it at."""

    address: str
    port: int
    etcd_port: int
    etcd_peer_port: int
    etcd_data: Path
    pki: Path

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    def write_certificates(self, authority: Authority, front_proxy: Authority) -> None:
        """Write the serving certificate and the keys that kube-apiserver signs and calls with into `pki`."""
        self.pki.mkdir(parents=True, exist_ok=True)
        (self.pki / "ca.crt").write_bytes(authority.certificate)
        (self.pki / "front-proxy-ca.crt").write_bytes(front_proxy.certificate)
        front_proxy.issue("front-proxy-client").write(self.pki, "front-proxy-client")
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        addresses = [str(API_SERVICE), "127.0.0.1", self.address]
        authority.issue("kube-apiserver", hosts=[*names, *addresses]).write(self.pki, "kube-apiserver")
        kubelet_client = authority.issue("kube-apiserver-kubelet-client", groups=["system:masters"])
        kubelet_client.write(self.pki, "kubelet-client")
        private, public = service_account_keys()
        write_private(self.pki / "service-accounts.key", private)
        (self.pki / "service-accounts.pub").write_bytes(public)

    def etcd(self) -> Sequence[str]:
        """etcd's arguments: loopback only, no fsync, for nothing here outlives the machine."""
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_peer_port}"
        return [
            f"--data-dir={self.etcd_data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def kube_apiserver(self) -> Sequence[str]:
        """kube-apiserver's arguments: RBAC, the Node authorizer, and a front proxy for aggregated APIs."""
        return [
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--tls-cert-file={self.pki}/kube-apiserver.crt",
            f"--tls-private-key-file={self.pki}/kube-apiserver.key",
            f"--client-ca-file={self.pki}/ca.crt",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.pki}/service-accounts.pub",
            f"--service-account-signing-key-file={self.pki}/service-accounts.key",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            f"--requestheader-client-ca-file={self.pki}/front-proxy-ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={self.pki}/front-proxy-client.crt",
            f"--proxy-client-key-file={self.pki}/front-proxy-client.key",
        ]
