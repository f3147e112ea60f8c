"""A node of a bare control plane: the agent as a program of its own, a real capturer behind it, a pod to capture."""

import asyncio
import functools
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from agent.capturer.protocol import State
from api import stamp
from api.capturenode import CaptureNode, NodeCapture
from api.capturepolicy import Limits
from api.packetcapture import PacketCaptureSpec
from hack.clusters.bare import BareControlPlane
from hack.clusters.pki import Authority
from hack.clusters.ports import free_port
from kube.certificates import KeyPair, client_context
from kube.client import CAPTURENODES, CONFIGMAPS, NAMESPACES, NODES, PACKETCAPTURES, PODS, Client, Json, Resource
from kube.status import StatusError
from tests.agent import world
from tests.agent.world import PORT
from tests.apiserver.standins import Signer

ROOT = Path(__file__).parents[2]
NODE = "node-1"
SERVICEACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount", namespaced=True)
PATIENCE = 30.0


async def eventually(question: Callable[[], Awaitable[Any]]) -> Any:
    answer: Any = None
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while not (answer := await question()):  # noqa: ASYNC110 - what is waited for is in another process
                await asyncio.sleep(0.05)
    assert answer, f"no true answer in time, the last was {answer!r}"
    return answer


@dataclass
class World:
    client: Client
    pod: world.Pod
    capturer: world.Capturer
    authority: Authority
    environment: dict[str, str]
    namespace: str
    process: asyncio.subprocess.Process = field(init=False)
    port: int = 0
    limits: Limits = field(default_factory=Limits)

    async def start_agent(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agent", cwd=ROOT, env=self.environment
        )

    async def stop_agent(self) -> int:
        self.process.terminate()
        return await self.process.wait()

    async def create_pod(self, *, labels: dict[str, str]) -> None:
        """The object of the pod whose namespace and process are real; its UID is the real one's choice of name."""
        created = await self.client.create(
            PODS,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "web-0", "labels": labels},
                "spec": {
                    "nodeName": NODE,
                    "containers": [{"name": "c", "image": "none"}],
                    "automountServiceAccountToken": False,
                    "tolerations": [{"operator": "Exists"}],
                },
            },
            namespace=self.namespace,
        )
        self.pod.become(created["metadata"]["uid"])
        status = {"phase": "Running", "podIP": self.pod.address, "podIPs": [{"ip": self.pod.address}]}
        await self.client.patch(PODS, "web-0", {"status": status}, namespace=self.namespace, subresource="status")

    async def create_capture(self, name: str, *, stamped: bool = True, admitted: bool = True, **spec: Any) -> str:
        spec = {"selector": "app == 'web'", "filters": [{"protocol": "UDP", "ports": [PORT]}]} | spec
        body = {
            "apiVersion": PACKETCAPTURES.api_version,
            "kind": PACKETCAPTURES.kind,
            "metadata": {"name": name, "annotations": self.stamp(spec) if stamped else {}},
            "spec": spec,
        }
        created = await self.client.create(PACKETCAPTURES, body, namespace=self.namespace)
        if admitted:
            condition = {
                "type": "Admitted",
                "status": "True",
                "reason": "Admitted",
                "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
            status = {"status": {"conditions": [condition]}}
            await self.client.patch(PACKETCAPTURES, name, status, namespace=self.namespace, subresource="status")
        return str(created["metadata"]["uid"])

    async def change_capture(self, name: str, spec: Json) -> None:
        current = await self.client.get(PACKETCAPTURES, name, namespace=self.namespace)
        spec = current["spec"] | spec
        patch = {"metadata": {"annotations": self.stamp(spec)}, "spec": spec}
        await self.client.patch(PACKETCAPTURES, name, patch, namespace=self.namespace)

    def stamp(self, spec: Json) -> dict[str, str]:
        given = stamp.Stamp(
            user="u",
            policy="p",
            limits=self.limits,
            namespace=self.namespace,
            spec_hash=stamp.spec_hash(PacketCaptureSpec.model_validate(spec)),
        )
        return {stamp.ANNOTATION: given.to_annotation()}

    async def reported(self, uid: str) -> NodeCapture | None:
        nodes = await self.client.list(CAPTURENODES, field_selector=f"metadata.name={NODE}")
        return next((CaptureNode.model_validate(node).capture(uid) for node in nodes.items), None)

    async def reported_as(self, uid: str, state: str, reason: str = "", *, packets: int | None = None) -> NodeCapture:
        async def so() -> NodeCapture | None:
            found = await self.reported(uid)
            fits = found and (found.state, found.reason) == (state, reason) and packets in (None, found.packets)
            return found if fits else None

        made: NodeCapture = await eventually(so)
        return made

    async def waits(self, uid: str) -> NodeCapture:
        """Captured, and without a packet up to now; whether any was seen is the pod's own business (IPv6)."""

        async def so() -> NodeCapture | None:
            found = await self.reported(uid)
            return found if found and found.reason in {"NoPacketYet", "FilterMatchedNothing"} else None

        made: NodeCapture = await eventually(so)
        assert made.state == "WaitingForTraffic"
        return made

    async def captures(self, count: int) -> None:
        """Wait until so many targets are captured, by the capturer's own word: the agent's may be an earlier one's."""

        async def so() -> bool:
            return [status.state for status in self.capturer.report()] == [State.CAPTURING] * count

        await eventually(so)

    async def flushed(self) -> bool:
        """Have the capturer write out what it holds."""
        return bool(self.capturer.report(flush=True))

    async def ask_health(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.environment['HEALTH_PORT']}/{path}"
        with suppress(aiohttp.ClientConnectionError):
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                return await response.text()
        return ""

    async def metrics(self) -> dict[str, float]:
        families = text_string_to_metric_families(await self.ask_health("metrics"))
        return {
            sample.name.removeprefix("kubepcap_agent_"): sample.value
            for family in families
            for sample in family.samples
        }

    async def ask(self, path: str) -> bytes:
        pair = self.authority.issue("kubepcap-apiserver")
        context = client_context(
            ca=self.authority.certificate, key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key)
        )
        url = f"https://127.0.0.1:{self.port}/captures/{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, ssl=context, server_hostname=f"{NODE}.agent.kubepcap") as response,
        ):
            body = await response.read()
            assert response.status == 200, body
            return body

    async def files(self, uid: str) -> list[Json]:
        """Asked until the agent has its certificate."""

        async def answered() -> bytes | None:
            with suppress(aiohttp.ClientConnectionError):
                return await self.ask(f"{uid}/files")
            return None

        listed: list[Json] = json.loads(await eventually(answered))["items"]
        return listed

    async def send(self, count: int) -> None:
        await asyncio.to_thread(self.pod.receive, count)


async def ensure(client: Client, resource: Resource, body: Json, *, namespace: str | None = None) -> None:
    with suppress(StatusError):  # an earlier test made it
        await client.create(resource, body, namespace=namespace)


async def listable(client: Client, resource: Resource) -> bool:
    with suppress(StatusError):
        await client.list(resource)
        return True
    return False


@asynccontextmanager
async def node(
    plane: BareControlPlane, directory: Path, *, pod: world.Pod, capturer: world.Capturer, **environment: str
) -> AsyncIterator[World]:
    """The node before its agent is started. `environment` goes to the agent."""
    authority = Authority.create("kubepcap")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=plane.kubeconfig))
        for resource in (PACKETCAPTURES, CAPTURENODES):  # a kind that is established may still be refused for a moment
            await eventually(functools.partial(listable, client, resource))
        namespace = f"dev-{uuid.uuid4().hex[:8]}"
        await ensure(client, NODES, {"metadata": {"name": NODE}})
        for name in ("kubepcap", namespace):
            await ensure(client, NAMESPACES, {"metadata": {"name": name}})
        await ensure(client, SERVICEACCOUNTS, {"metadata": {"name": "default"}}, namespace=namespace)
        bundle = {"data": {"ca.crt": authority.certificate.decode()}}
        await ensure(client, CONFIGMAPS, {"metadata": {"name": "kubepcap-ca"}} | bundle, namespace="kubepcap")
        await client.patch(CONFIGMAPS, "kubepcap-ca", bundle, namespace="kubepcap")  # an earlier test's was another
        signer = asyncio.create_task(Signer(client, authority).run(), name="signer")
        stack.callback(signer.cancel)
        port = free_port()
        settings = {
            "KUBECONFIG": str(plane.kubeconfig),
            "NODE_NAME": NODE,
            "POD_NAME": "agent-1",
            "CAPTURER_SOCKET": str(directory / "capturer.sock"),
            "DATA_DIRECTORY": str(directory),
            "PORT": str(port),
            "HEALTH_PORT": str(free_port()),
            "MIN_FREE_BYTES": "0",
            "MIN_FREE_PERCENT": "0",
            "COUNTERS_SECONDS": "1",
        }
        yield World(client, pod, capturer, authority, os.environ | settings | environment, namespace, port)
