"""The workloads of the demo and the end-to-end tests: the workshop's namespaces `dev` and `hipstershop`."""

import time

from hack.clusters.binaries import HACK
from hack.clusters.failure import Failure
from hack.clusters.kubectl import Kubectl

MANIFESTS = HACK.parent / "manifests" / "demo"
PATIENCE = 120


def deploy(kubectl: Kubectl) -> None:
    """Create the workloads and wait until they serve."""
    deadline = time.monotonic() + PATIENCE
    # A bare pod is refused until its new namespace has a ServiceAccount.
    while (done := kubectl("apply", "--kustomize", str(MANIFESTS), check=False)).returncode != 0:
        if time.monotonic() > deadline or "serviceaccount" not in done.stderr:
            raise Failure(f"could not create the workloads: {done.stderr.strip()}")
        time.sleep(0.1)
    for namespace in ("dev", "hipstershop"):
        where = f"--namespace={namespace}"
        for workload in kubectl("get", "deployments", where, "--output=name").stdout.split():
            kubectl("rollout", "status", workload, where, f"--timeout={PATIENCE}s", timeout=PATIENCE + 10)
    ready = ["wait", "pod/centos", "pod/netshoot", "--namespace=dev", "--for=condition=Ready"]
    kubectl(*ready, f"--timeout={PATIENCE}s", timeout=PATIENCE + 10)
    for host, port in (("nginx-svc.dev", 80), ("productcatalogservice.hipstershop", 3550)):
        _wait_until_served(kubectl, host, port, deadline)


def _wait_until_served(kubectl: Kubectl, host: str, port: int, deadline: float) -> None:
    """Wait for what follows readiness by a moment: the nodes' rules for the Service."""
    for pod in ("centos", "netshoot"):
        probe = ["exec", "--namespace=dev", pod, "--", "nc", "-z", "-w", "2", host, str(port)]
        while (done := kubectl(*probe, check=False)).returncode != 0:
            if time.monotonic() > deadline:
                raise Failure(f"{pod} can't reach {host}:{port}: {done.stderr.strip()}")
            time.sleep(0.1)
