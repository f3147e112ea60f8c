"""The pods of this node, as far as capturing needs to know them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from kube.client import NAMESPACES, PODS, Client, Json
from kube.watch import Cache, Signal

OPT_OUT_LABEL = "kubepcap.io/capture"
OPT_OUT_VALUE = "deny"

_MIRROR_ANNOTATION = "kubernetes.io/config.mirror"
_CGROUP_UID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod of this node. `addresses` is empty until its sandbox has a network."""

    namespace: str
    name: str
    cgroup_uid: str
    """The UID by which kubelet knows it: for a static pod not that of the object in the API, which mirrors it."""
    labels: Mapping[str, str]
    addresses: tuple[str, ...]
    phase: str
    host_network: bool
    terminating: bool

    @property
    def opted_out(self) -> bool:
        return self.labels.get(OPT_OUT_LABEL) == OPT_OUT_VALUE

    @property
    def finished(self) -> bool:
        return self.phase in {"Succeeded", "Failed"}


def parse_pod(document: Json) -> Pod:
    """Read a `v1.Pod`. Raises ValueError when an address is none."""
    metadata, spec, status = document["metadata"], document.get("spec") or {}, document.get("status") or {}
    addresses = [entry["ip"] for entry in status.get("podIPs") or [] if entry.get("ip")]
    return Pod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        cgroup_uid=_cgroup_uid(metadata),
        labels=metadata.get("labels") or {},
        addresses=tuple(str(ip_address(address)) for address in addresses),
        phase=status.get("phase") or "Unknown",
        host_network=bool(spec.get("hostNetwork")),
        terminating="deletionTimestamp" in metadata,
    )


def _cgroup_uid(metadata: Json) -> str:
    """Whoever forges the annotation gains nothing: the network namespace found must hold the pod's address."""
    mirrored = (metadata.get("annotations") or {}).get(_MIRROR_ANNOTATION, "")
    return str(mirrored if _CGROUP_UID.fullmatch(mirrored) else metadata["uid"])


def pods_of(node: str, client: Client, changed: Signal) -> Cache[Pod]:
    """Follow the pods of one node only: a thousand agents must not read all pods of the cluster."""
    return Cache(client, PODS, parse_pod, field_selector=f"spec.nodeName={node}", on_change=lambda _: changed.set())


def namespaces_opted_out(client: Client, changed: Signal) -> Cache[str]:
    """Follow the namespaces that must not be captured."""
    return Cache(
        client,
        NAMESPACES,
        lambda document: str(document["metadata"]["name"]),
        label_selector=f"{OPT_OUT_LABEL}={OPT_OUT_VALUE}",
        metadata_only=True,
        on_change=lambda _: changed.set(),
    )
