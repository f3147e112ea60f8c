"""A node: containerd with a bridge of its own, kubelet and kube-proxy."""

import json
import subprocess
from pathlib import Path
from typing import Any

from hack.clusters import cgroups
from hack.clusters.api import Api
from hack.clusters.cluster import DNS_SERVICE, PODS, Cluster
from hack.clusters.machine import Machine, mount, tmpfs

PAUSE_IMAGE = "kubepcap.invalid/pause:dev"
PAUSE_ARCHIVE = "pause.tar"

# What a node must not share with another, nor keep on an overlay of ours: containerd lays overlays of its own over it.
OWN_DIRECTORIES = ("/var/lib/containerd", "/var/lib/kubelet", "/var/lib/cni", "/var/lib/kubepcap", "/var/log")

# kubelet sets these for the whole machine. It is shown files that hold what it wants, and then writes nothing.
KUBELET_SYSCTLS = {"vm/overcommit_memory": 1, "kernel/panic": 10, "kernel/panic_on_oops": 1}

CONTAINERD = f"""\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE no score can be lowered; sandboxes would fail with "can't get final child's PID from pipe".
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
"""


def run(machine: Machine) -> None:
    """Start the node's programs and return."""
    cluster = machine.cluster
    for directory in OWN_DIRECTORIES:
        tmpfs(Path(directory))
    for name, value in KUBELET_SYSCTLS.items():
        shown = machine.files / name.replace("/", ".")
        shown.write_text(f"{value}\n")
        mount("--bind", str(shown), f"/proc/sys/{name}")
    write_json(Path("/etc/cni/net.d/10-bridge.conflist"), cni_settings(cluster, machine.name))
    containerd = machine.files / "containerd.toml"
    containerd.write_text(CONTAINERD)
    machine.start("containerd", ["--config", containerd])
    kubelet, proxy = machine.files / "kubelet.json", machine.files / "kube-proxy.json"
    write_json(kubelet, kubelet_settings(cluster, machine.name))
    write_json(proxy, proxy_settings(cluster, machine.name))
    machine.wait(lambda: ctr("version"))
    machine.wait(lambda: ctr("images", "import", str(cluster.state / PAUSE_ARCHIVE)))
    machine.wait(Api(cluster.kubeconfig).ready)
    machine.start(
        "kubelet",
        [
            f"--config={kubelet}",
            f"--kubeconfig={cluster.pki}/{machine.name}.kubeconfig",
            f"--hostname-override={machine.name}",
            f"--node-ip={machine.address}",
        ],
    )
    machine.start("kube-proxy", [f"--config={proxy}"])


def cni_settings(cluster: Cluster, node: str) -> dict[str, Any]:
    """A bridge with the node's share of the pods' addresses. It enforces no NetworkPolicy."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": str(cluster.pods(node))}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    port_map = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, port_map]}


def kubelet_settings(cluster: Cluster, node: str) -> dict[str, Any]:
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroups.path_of(cluster, node),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{cluster.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{cluster.pki}/{node}.crt",
        "tlsPrivateKeyFile": f"{cluster.pki}/{node}.key",
        "clusterDomain": "cluster.local",
        "clusterDNS": [str(DNS_SERVICE)],
        "resolvConf": "/etc/resolv.conf",
        "oomScoreAdj": 0,
        # A full disk of the machine underneath is no reason to evict what the cluster keeps in memory.
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
        "healthzBindAddress": "127.0.0.1",
    }
    if not cgroups.unified():
        settings["failCgroupV1"] = False
    return settings


def proxy_settings(cluster: Cluster, node: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": str(PODS),
        "clientConnection": {"kubeconfig": f"{cluster.pki}/kube-proxy.kubeconfig"},
        "conntrack": {"maxPerCore": 0},  # the limit is the whole machine's
        "iptables": {"minSyncPeriod": "0s"},
        "hostnameOverride": node,
    }


def ctr(*arguments: str) -> bool:
    """Whether containerd's client succeeded, in the namespace of Kubernetes' images."""
    done = subprocess.run(["ctr", "--namespace=k8s.io", *arguments], capture_output=True, check=False)
    return done.returncode == 0


def write_json(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))
