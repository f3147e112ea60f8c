"""What a cluster is called and where its parts are: the one place that knows paths, addresses and host-wide names."""

import dataclasses
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import subprocess
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Self

from hack.clusters.failure import Failure

CONTROL_PLANE = "control-plane"
DEFAULT_NAME = "kubepcap"
SERVICES = IPv4Network("10.96.0.0/16")
API_SERVICE = SERVICES[1]
DNS_SERVICE = SERVICES[10]
PODS = IPv4Network("10.244.0.0/16")
LANS = IPv4Network("10.200.0.0/16")


def cache() -> Path:
    return Path(os.environ.get("KUBEPCAP_CACHE") or Path.home() / ".cache" / "kubepcap")


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster's plan. `lan` is a /24 of its own: .10 is the control plane, .11 and on are nodes, .254 is the host."""

    name: str
    lan: IPv4Network
    nodes: tuple[str, ...] = ("node-a", "node-b")

    @property
    def machines(self) -> tuple[str, ...]:
        return (CONTROL_PLANE, *self.nodes)

    @property
    def state(self) -> Path:
        return state_directory(self.name)

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def cgroup(self) -> str:
        """The cgroup that holds everything the cluster runs, below the root of every hierarchy."""
        return f"kubepcap-{self.name}"

    @property
    def host_interface(self) -> str:
        """The host's end of the LAN; an interface's name has at most 15 characters, so it is made of a digest."""
        return "kp-" + hashlib.sha256(self.name.encode()).hexdigest()[:8]

    @property
    def host_address(self) -> IPv4Address:
        return self.lan[254]

    @property
    def api_url(self) -> str:
        return f"https://{self.address(CONTROL_PLANE)}:6443"

    def address(self, machine: str) -> IPv4Address:
        return self.lan[10 + self.machines.index(machine)]

    def pods(self, node: str) -> IPv4Network:
        return list(PODS.subnets(new_prefix=24))[1 + self.nodes.index(node)]

    def log(self, machine: str, program: str) -> Path:
        return self.logs / f"{machine}.{program}.log"

    @property
    def programs(self) -> dict[str, str]:
        """Where the programs are that its machines run; those of the distribution are not among them."""
        programs: dict[str, str] = json.loads((self.state / "programs.json").read_text())
        return programs

    def save(self) -> None:
        plan = {"name": self.name, "lan": str(self.lan), "nodes": list(self.nodes)}
        (self.state / "cluster.json").write_text(json.dumps(plan))

    @classmethod
    def load(cls, name: str) -> Self:
        """The plan of a cluster that was started; Failure when there is none."""
        try:
            plan = json.loads((state_directory(name) / "cluster.json").read_text())
        except FileNotFoundError:
            raise Failure(f"cluster {name} is not up; start it with: hack/cluster --name {name} up") from None
        return cls(name=plan["name"], lan=IPv4Network(plan["lan"]), nodes=tuple(plan["nodes"]))

    @classmethod
    def allocate(cls, name: str) -> Self:
        """Plan a new cluster on a LAN that neither the host nor another cluster uses, and write the plan down."""
        state = state_directory(name)
        state.mkdir(parents=True, exist_ok=True)
        with (state.parent / "lans.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cluster = cls(name=name, lan=free_lan(name, taken=_host_networks() + _planned_lans(apart_from=name)))
            cluster.save()
        return cluster


def valid_name(name: str) -> str:
    """The name itself when it can be part of cgroup and file names; ValueError otherwise."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(f"cluster name {name!r}: use at most 40 lower-case letters, digits and dashes")
    return name


def state_directory(name: str) -> Path:
    return cache() / "clusters" / name


def free_lan(name: str, *, taken: list[IPv4Network]) -> IPv4Network:
    """A /24 that overlaps none of those taken; the same name gets the same one whenever it can."""
    lans = list(LANS.subnets(new_prefix=24))
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") % len(lans)
    for lan in lans[start:] + lans[:start]:
        if not any(lan.overlaps(other) for other in taken):
            return lan
    raise Failure(f"every network of {LANS} is in use on this machine; take a cluster down first")


def _host_networks() -> list[IPv4Network]:
    # Routes, not addresses: a VPN or another container network behind a gateway would be cut off just as well.
    routes = json.loads(subprocess.run(["ip", "-json", "-4", "route"], check=True, capture_output=True).stdout)
    return [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]


def _planned_lans(*, apart_from: str) -> list[IPv4Network]:
    plans = [path for path in (cache() / "clusters").glob("*/cluster.json") if path.parent.name != apart_from]
    return [IPv4Network(json.loads(path.read_text())["lan"]) for path in plans]
