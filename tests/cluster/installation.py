"""What `manifests/` installs, on a bare control plane: the objects as they are, the programs as processes on loopback.

Services lead to this machine. Pods are objects without a kubelet, but their tokens are real: the signer sees of them
what it sees in a cluster.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from hack.clusters.bare import BareControlPlane
from hack.clusters.ports import free_port
from kube.client import PODS, Client, Json, Resource

ROOT = Path(__file__).parents[2]
SERVICEACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount", namespaced=True)
PATIENCE = 60.0
"""Seconds; longer than a lease and its takeover."""


async def eventually(question: Callable[[], Awaitable[Any]], *, patience: float = PATIENCE) -> Any:
    """The first true answer; without one in time, the test fails and shows the last."""
    answer: Any = None
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            while True:
                if answer := await question():
                    return answer
                await asyncio.sleep(0.1)
    raise AssertionError(f"no true answer in time, the last was {answer!r}")


@dataclass
class Program:
    """One of our programs as a child process."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    health_port: int

    async def is_up(self) -> bool:
        """Whether it has begun its work."""
        with suppress(aiohttp.ClientError):
            async with aiohttp.request("GET", f"http://127.0.0.1:{self.health_port}/livez") as response:
                return response.status == 200
        return False

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()


@dataclass
class Installation:
    """`ports` are those of this machine that the Services lead to, by the Services' names."""

    plane: BareControlPlane
    client: Client
    directory: Path
    ports: dict[str, int] = field(default_factory=dict)

    async def apply_manifests(self) -> None:
        """Apply the manifests, with the Services and their ports changed."""
        kubectl = [str(self.plane.kubectl), f"--kubeconfig={self.plane.kubeconfig}"]
        built = await asyncio.to_thread(
            subprocess.run, [*kubectl, "kustomize", str(ROOT / "manifests")], check=True, capture_output=True
        )
        documents = [document for document in yaml.safe_load_all(built.stdout) if document]
        for document in documents:
            self._lead_here(document)
        # Namespaces first, for the rest to lie in.
        documents.sort(key=lambda document: document["kind"] != "Namespace")
        given = yaml.safe_dump_all(documents).encode()
        applied = await asyncio.to_thread(
            subprocess.run, [*kubectl, "apply", "--filename=-"], input=given, capture_output=True, check=False
        )
        assert applied.returncode == 0, applied.stderr.decode()

    def _lead_here(self, document: Json) -> None:
        port = self.ports.get(document["metadata"]["name"])
        if document["kind"] == "Service" and port is not None:
            document["spec"] = {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}
        addresses = [webhook["clientConfig"]["service"] for webhook in document.get("webhooks") or []]
        if document["kind"] == "APIService":
            addresses = [document["spec"]["service"]]
        for address in addresses:
            address["port"] = self.ports.get(address["name"], address["port"])

    def controller_kubeconfig(self) -> Path:
        """That of the controller's ServiceAccount; its pod is of no interest to anyone."""
        return self.plane.kubeconfig_for(
            "system:serviceaccount:kubepcap:kubepcap-controller",
            "system:serviceaccounts",
            "system:serviceaccounts:kubepcap",
        )

    async def start(self, module: str, pod: str, kubeconfig: Path, **environment: str) -> Program:
        log, health_port = self.directory / f"{pod}.log", free_port()
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(ROOT),
                    "KUBECONFIG": str(kubeconfig),
                    "POD_NAME": pod,
                    "POD_NAMESPACE": "kubepcap",
                    "HEALTH_PORT": str(health_port),
                    **environment,
                },
                stdout=output,
                stderr=output,
            )
        return Program(pod, process, log, health_port)

    async def add_pod(self, account: str, kind: str, owner: str, *, node: str = "node-a", name: str = "") -> str:
        pod = name or f"{account}-0"
        await self.client.create(
            PODS,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": pod,
                    "labels": {
                        "app.kubernetes.io/name": "kubepcap",
                        "app.kubernetes.io/component": account.removeprefix("kubepcap-"),
                    },
                    "ownerReferences": [
                        {"apiVersion": "apps/v1", "kind": kind, "name": owner, "uid": "none", "controller": True}
                    ],
                },
                "spec": {
                    "serviceAccountName": account,
                    "nodeName": node,
                    "containers": [{"name": "x", "image": "kubepcap.invalid/x"}],
                },
            },
            namespace="kubepcap",
        )
        return pod

    async def kubeconfig_of(self, account: str, pod: str) -> Path:
        """A kubeconfig with a token of the ServiceAccount bound to the pod, as its kubelet would fetch it."""
        found = await self.client.get(PODS, pod, namespace="kubepcap")
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": found["metadata"]["uid"]}
        review = await self.client.create(
            SERVICEACCOUNTS,
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound}},
            namespace="kubepcap",
            name=account,
            subresource="token",
        )
        config = json.loads(self.plane.kubeconfig.read_text())
        config["users"] = [{"name": config["users"][0]["name"], "user": {"token": review["status"]["token"]}}]
        path = self.directory / f"{pod}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path
