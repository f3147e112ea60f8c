"""Putting this checkout into a cluster: images into the nodes, `manifests/` into the API server, until all is ready."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hack.clusters.binaries import HACK
from hack.clusters.cluster import Cluster
from hack.clusters.failure import Failure
from hack.clusters.keeper import entering
from hack.clusters.kubectl import Kubectl
from hack.clusters.lifecycle import phase
from hack.oci.build import builder, store
from hack.oci.store import Descriptor

MANIFESTS = HACK.parent / "manifests"
NAMESPACE = "kubepcap"
PATIENCE = 180
CRASHES = 3

# Refused or allowed, either answer comes from the webhook.
PROBE = {
    "apiVersion": "kubepcap.io/v1",
    "kind": "PacketCapture",
    "metadata": {"name": "install-probe", "namespace": "default"},
    "spec": {"selector": "app == 'install-probe'"},
}


def install(cluster: Cluster) -> None:
    """Install or update; Failure says what did not become ready."""
    kubectl = Kubectl(cluster.kubeconfig)
    with phase("images"):
        images = builder().build()
    with phase("images loaded"):
        load(cluster, images)
    with phase("manifests applied"):
        kubectl("apply", "--kustomize", str(MANIFESTS))
        restart_stale(kubectl, images)
    with phase("ready"):
        wait_until_ready(kubectl)


def load(cluster: Cluster, images: Mapping[str, Descriptor]) -> None:
    """Import into every node those images that it has not, or has in another version."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: _load(cluster, node, images), cluster.nodes))


def restart_stale(kubectl: Kubectl, images: Mapping[str, Descriptor]) -> None:
    """Restart what runs an older image: the tag is the same, so Kubernetes can't know."""
    wanted = {reference: store().manifest(descriptor)["config"]["digest"] for reference, descriptor in images.items()}
    stale = set()
    for pod, container in _containers(kubectl):
        if container["imageID"] and container["imageID"] != wanted.get(container["image"], container["imageID"]):
            stale.add(pod["metadata"]["labels"]["app.kubernetes.io/component"])
    for component in sorted(stale):
        label = f"--selector=app.kubernetes.io/component={component}"
        kubectl("rollout", "restart", "deployments,daemonsets", f"--namespace={NAMESPACE}", label)


def wait_until_ready(kubectl: Kubectl) -> None:
    """Wait until the kinds are established, every pod is ready, the API is available and the webhook answers."""
    deadline = time.monotonic() + PATIENCE
    restarts = _restarts(kubectl)
    crds = ["packetcaptures.kubepcap.io", "capturepolicies.kubepcap.io", "capturenodes.kubepcap.io"]
    kubectl("wait", "crd", *crds, "--for=condition=Established", "--timeout=60s")
    namespace = f"--namespace={NAMESPACE}"
    for workload in kubectl("get", "deployments,daemonsets", namespace, "--output=name").stdout.split():
        status = ["rollout", "status", workload, namespace, "--timeout=5s"]
        while (done := kubectl(*status, check=False)).returncode != 0:
            crashes = _crashes(kubectl, restarts)
            if crashes or time.monotonic() > deadline:
                pods = kubectl("get", "pods", namespace, "--output=wide").stdout
                said = done.stderr.strip()
                raise Failure(f"{workload} did not become ready: {said}\n{pods}{crashes or _events(kubectl)}")
    api = ["wait", "apiservice/v1.subresources.kubepcap.io", "--for=condition=Available", "--timeout=60s"]
    kubectl(*api)
    _poll("the webhook does not answer", deadline, lambda: _webhook_objection(kubectl))


def _webhook_objection(kubectl: Kubectl) -> str | None:
    done = kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(PROBE), check=False)
    answered = done.returncode == 0 or "denied the request" in done.stderr
    return None if answered else done.stderr.strip()


def _poll(what: str, deadline: float, objection: Callable[[], str | None]) -> None:
    while said := objection():
        if time.monotonic() > deadline:
            raise Failure(f"{what}: {said}")
        time.sleep(0.2)


def _containers(kubectl: Kubectl) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every container's status, with its pod; pods that are being replaced are not counted any more."""
    for pod in kubectl.json("get", "pods", f"--namespace={NAMESPACE}")["items"]:
        if "deletionTimestamp" not in pod["metadata"]:
            for container in pod["status"].get("containerStatuses", ()):
                yield pod, container


def _restarts(kubectl: Kubectl) -> Counter[tuple[str, str]]:
    return Counter(
        {(pod["metadata"]["name"], each["name"]): each["restartCount"] for pod, each in _containers(kubectl)}
    )


def _crashes(kubectl: Kubectl, before: Counter[tuple[str, str]]) -> str:
    """What the containers said that ended again and again since `before`; empty when there is none."""
    said = []
    for (pod, container), count in (_restarts(kubectl) - before).items():
        if count >= CRASHES:
            logs = ["logs", pod, f"--namespace={NAMESPACE}", f"--container={container}", "--previous", "--tail=10"]
            said.append(f"{pod} {container} ended {count} times; at last it said:")
            said.append(kubectl(*logs, check=False).stdout)
    return "\n".join(said)


def _events(kubectl: Kubectl) -> str:
    warnings = ["get", "events", f"--namespace={NAMESPACE}", "--field-selector=type=Warning"]
    lines = kubectl(*warnings, "--sort-by=.lastTimestamp", check=False).stdout.splitlines()
    return "\n".join(lines[-10:])


def _load(cluster: Cluster, node: str, images: Mapping[str, Descriptor]) -> None:
    ctr = [*entering(cluster, node), "ctr", "--namespace=k8s.io", "images"]
    listing = subprocess.run([*ctr, "list"], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        raise Failure(f"containerd on {node} does not answer", log=cluster.log(node, "containerd"))
    # REF TYPE DIGEST …
    present = {fields[0]: fields[2] for line in listing.stdout.splitlines()[1:] if len(fields := line.split()) > 2}
    missing = {name: image for name, image in images.items() if present.get(name) != image["digest"]}
    if not missing:
        return
    with subprocess.Popen(
        [*ctr, "import", "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            with process.stdin as archive:
                store().export(missing, archive)
        except BrokenPipeError:
            pass  # what the importer says tells why
        said = process.stderr.read().decode(errors="replace")
    if process.returncode != 0:
        raise Failure(f"{node} could not import {', '.join(missing)}: {said.strip()}")
