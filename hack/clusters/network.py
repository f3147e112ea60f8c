"""The network of a cluster: a bridge in the control plane's namespace, to which every node and the host are plugged."""

import subprocess
from collections.abc import Mapping

from hack.clusters.cluster import CONTROL_PLANE, Cluster


def connect(cluster: Cluster, processes: Mapping[str, int]) -> None:
    """Join the machines' network namespaces; `processes` is a process in each."""
    centre = processes[CONTROL_PLANE]
    gateway = cluster.address(CONTROL_PLANE)
    ip(None, f"link add {cluster.host_interface} type veth peer name host netns {centre}")
    ip(
        centre,
        "link set lo up",
        # An address of its own: else it takes its ports' lowest, which changes under everyone when a node dies.
        "link add lan address 02:00:00:00:00:01 type bridge",
        f"addr add {gateway}/{cluster.lan.prefixlen} dev lan",
        "link set host master lan up",
        # Nothing inside reaches the outside; with forwarding on, it is told so at once and does not hang.
        "route add unreachable default metric 9999",
        *(
            f"link add port-{i} type veth peer name eth0 netns {processes[node]}"
            for i, node in enumerate(cluster.nodes)
        ),
        *(f"link set port-{i} master lan up" for i, _ in enumerate(cluster.nodes)),
        "link set lan up",
        *_pod_routes(cluster, CONTROL_PLANE),
    )
    ip(
        None,
        f"addr add {cluster.host_address}/{cluster.lan.prefixlen} dev {cluster.host_interface}",
        f"link set {cluster.host_interface} up",
    )
    for node in cluster.nodes:
        ip(
            processes[node],
            "link set lo up",
            f"addr add {cluster.address(node)}/{cluster.lan.prefixlen} dev eth0",
            "link set eth0 up",
            f"route add default via {gateway}",  # kubelet wants one
            *_pod_routes(cluster, node),
        )
    for process in processes.values():
        forwarding = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run(["nsenter", f"--target={process}", "--net", "sh", "-c", forwarding], check=True)


def disconnect(cluster: Cluster) -> None:
    """Remove the host's interface. It goes with the namespaces too, but the kernel takes its time."""
    subprocess.run(["ip", "link", "delete", cluster.host_interface], capture_output=True, check=False)


def ip(process: int | None, *commands: str) -> None:
    """Run commands of ip(8) in the network namespace of a process, or in the host's."""
    entering = [] if process is None else ["nsenter", f"--target={process}", "--net"]
    subprocess.run([*entering, "ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def _pod_routes(cluster: Cluster, machine: str) -> list[str]:
    others = [node for node in cluster.nodes if node != machine]
    return [f"route add {cluster.pods(node)} via {cluster.address(node)}" for node in others]
