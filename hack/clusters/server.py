"""The control plane as a machine of the two-node cluster: etcd, the Kubernetes servers, and CoreDNS beside them."""

import subprocess
from pathlib import Path

from hack.clusters.api import Api
from hack.clusters.cluster import CONTROL_PLANE, DNS_SERVICE, Cluster
from hack.clusters.controlplane import AUDIT_POLICY, ControlPlane
from hack.clusters.failure import Failure
from hack.clusters.machine import Machine, tmpfs
from hack.clusters.pki import Authority, kubeconfig, write_private

DNS_OBJECTS = Path(__file__).with_name("dns.yaml")
DNS_HEALTH_PORT = 8181

COREFILE = """\
. {{
  bind {address}
  errors
  ready {address}:{health_port}
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig}
    pods insecure
  }}
  loadbalance
}}
"""


def control_plane(cluster: Cluster) -> ControlPlane:
    return ControlPlane(
        address=str(cluster.address(CONTROL_PLANE)),
        port=6443,
        etcd_port=2379,
        etcd_peer_port=2380,
        etcd_data=cluster.state / CONTROL_PLANE / "etcd",
        pki=cluster.pki,
    )


def write_certificates(cluster: Cluster) -> None:
    """Everything that the machines of a cluster prove themselves with, and the admin's kubeconfig."""
    authority = Authority.create(f"kubepcap-{cluster.name}")
    control_plane(cluster).write_certificates(authority, Authority.create("front-proxy"))

    def write_kubeconfig(path: Path, user: str, *groups: str) -> None:
        content = kubeconfig(
            cluster=cluster.name,
            server=cluster.api_url,
            ca=authority.certificate,
            user=user,
            pair=authority.issue(user, groups=groups),
        )
        write_private(path, content)

    write_kubeconfig(cluster.kubeconfig, "admin", "system:masters")
    for user in ("system:kube-controller-manager", "system:kube-scheduler", "system:kube-proxy", "coredns"):
        write_kubeconfig(cluster.pki / f"{user.removeprefix('system:')}.kubeconfig", user)
    for node in cluster.nodes:
        write_kubeconfig(cluster.pki / f"{node}.kubeconfig", f"system:node:{node}", "system:nodes")
        authority.issue(node, hosts=[node, str(cluster.address(node))]).write(cluster.pki, node)
    # For users that tests and demos make up: kube-apiserver takes their name and groups from a certificate.
    authority.pair.write(cluster.pki, "ca")


def run(machine: Machine) -> None:
    """Start the control plane's programs and return."""
    cluster, settings = machine.cluster, control_plane(machine.cluster)
    tmpfs(settings.etcd_data)
    machine.start("etcd", settings.etcd())
    audit = machine.files / "audit.yaml"
    audit.write_text(AUDIT_POLICY)
    machine.start(
        "kube-apiserver",
        [
            *settings.kube_apiserver(),
            f"--advertise-address={machine.address}",
            # There is no kube-proxy here: aggregated APIs and webhooks are reached at their endpoints.
            "--enable-aggregator-routing",
            # By name, exec and logs would wait for a DNS that knows no nodes.
            "--kubelet-preferred-address-types=InternalIP,Hostname",
            f"--kubelet-client-certificate={cluster.pki}/kubelet-client.crt",
            f"--kubelet-client-key={cluster.pki}/kubelet-client.key",
            f"--kubelet-certificate-authority={cluster.pki}/ca.crt",
            f"--audit-policy-file={audit}",
            f"--audit-log-path={cluster.logs}/audit.log",
            "--audit-log-maxsize=100",
            "--audit-log-maxbackup=2",
        ],
    )
    machine.wait(Api(cluster.kubeconfig).ready)
    for program, arguments in (
        (
            "kube-controller-manager",
            [
                f"--root-ca-file={cluster.pki}/ca.crt",
                f"--service-account-private-key-file={cluster.pki}/service-accounts.key",
                "--use-service-account-credentials",
                # The defaults throttle the first seconds, when every namespace and controller wants its ServiceAccount.
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
            ],
        ),
        ("kube-scheduler", []),
    ):
        credentials = f"--kubeconfig={cluster.pki}/{program}.kubeconfig"
        common = [credentials, "--leader-elect=false", "--bind-address=127.0.0.1"]
        machine.start(program, [*common, *arguments])
    _start_dns(machine)


def _start_dns(machine: Machine) -> None:
    cluster = machine.cluster
    objects = DNS_OBJECTS.read_text().format(address=machine.address, service=DNS_SERVICE)
    kubectl = [machine.program("kubectl"), f"--kubeconfig={cluster.kubeconfig}", "apply", "--filename=-"]
    log = cluster.log(machine.name, "dns-objects")
    with log.open("ab") as output:
        done = subprocess.run(kubectl, input=objects.encode(), stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise Failure("could not create the objects of CoreDNS", log=log)
    settings = COREFILE.format(
        address=machine.address, health_port=DNS_HEALTH_PORT, kubeconfig=cluster.pki / "coredns.kubeconfig"
    )
    corefile = machine.files / "Corefile"
    corefile.write_text(settings)
    machine.start("coredns", ["-conf", corefile])
