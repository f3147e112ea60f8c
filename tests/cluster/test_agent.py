"""The agent as a program of its own: a real kube-apiserver before it, a real capturer behind it, real packets."""

import asyncio
import functools
import json
import os
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.capturer.protocol import State
from api import stamp
from api.capturenode import CaptureNode, NodeCapture
from api.capturepolicy import Limits
from api.packetcapture import PacketCaptureSpec
from hack.clusters.bare import BareControlPlane
from hack.clusters.pki import Authority
from kube.certificates import KeyPair, client_context
from kube.client import CAPTURENODES, CONFIGMAPS, NAMESPACES, NODES, PACKETCAPTURES, PODS, Client, Json, Resource
from kube.status import StatusError
from tests.agent import world
from tests.agent.world import PORT, make_pod
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ensure(client: Client, resource: Resource, body: Json, *, namespace: str | None = None) -> None:
    with suppress(StatusError):  # an earlier test made it
        await client.create(resource, body, namespace=namespace)


async def listable(client: Client, resource: Resource) -> bool:
    with suppress(StatusError):
        await client.list(resource)
        return True
    return False


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("kubepcap")


@pytest.fixture
async def cluster(crds: BareControlPlane, authority: Authority, tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=crds.kubeconfig))
        for resource in (PACKETCAPTURES, CAPTURENODES):  # a kind that is established may still be refused for a moment
            await eventually(functools.partial(listable, client, resource))
        namespace = f"dev-{uuid.uuid4().hex[:8]}"
        await ensure(client, NODES, {"metadata": {"name": NODE}})
        for name in ("kubepcap", namespace):
            await ensure(client, NAMESPACES, {"metadata": {"name": name}})
        await ensure(client, SERVICEACCOUNTS, {"metadata": {"name": "default"}}, namespace=namespace)
        bundle = {"metadata": {"name": "kubepcap-ca"}, "data": {"ca.crt": authority.certificate.decode()}}
        await ensure(client, CONFIGMAPS, bundle, namespace="kubepcap")
        signer = asyncio.create_task(Signer(client, authority).run())
        stack.callback(signer.cancel)
        made_pod = stack.enter_context(make_pod())
        capturer = world.Capturer(tmp_path)
        stack.callback(capturer.close)
        port = free_port()
        environment = os.environ | {
            "KUBECONFIG": str(crds.kubeconfig),
            "NODE_NAME": NODE,
            "POD_NAME": "agent-1",
            "CAPTURER_SOCKET": str(tmp_path / "capturer.sock"),
            "DATA_DIRECTORY": str(tmp_path),
            "PORT": str(port),
            "HEALTH_PORT": str(free_port()),
            "MIN_FREE_BYTES": "0",
            "MIN_FREE_PERCENT": "0",
            "COUNTERS_SECONDS": "1",
        }
        made = World(client, made_pod, capturer, authority, environment, namespace, port)
        await made.start_agent()
        yield made
        if made.process.returncode is None:
            assert await made.stop_agent() == 0
        for item in (await client.list(PACKETCAPTURES, namespace=namespace)).items:
            await client.delete(PACKETCAPTURES, item["metadata"]["name"], namespace=namespace)


async def test_a_capture_runs_and_its_files_are_served(cluster: World) -> None:
    uid = await cluster.create_capture("c")
    await cluster.create_pod(labels={"app": "web"})
    waiting = await cluster.waits(uid)
    assert (waiting.pods, waiting.name, waiting.namespace) == (1, "c", cluster.namespace)
    await cluster.send(100)
    capturing = await cluster.reported_as(uid, "Capturing", packets=100)
    assert (capturing.pods, capturing.dropped, capturing.files) == (1, 0, 1)
    (file,) = await cluster.files(uid)
    assert (file["packets"], file["state"], file["pod"], file["node"]) == (100, "Writing", "web-0", NODE)
    content = await cluster.ask(f"{uid}/files/{file['name']}")
    assert len(content) == file["size"] == 24 + 100 * (16 + world.HEADERS + 64)

    node = await cluster.client.get(CAPTURENODES, NODE)
    (owner,) = node["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Node", NODE)
    assert node["status"]["disk"]["capacity"] > 0

    await cluster.client.delete(PACKETCAPTURES, "c", namespace=cluster.namespace)

    async def gone() -> bool:
        return await cluster.reported(uid) is None and not (cluster.capturer.captures / uid).exists()

    await eventually(gone)


async def test_captures_pause_on_a_full_disk_and_go_on_when_there_is_room(cluster: World) -> None:
    uid = await cluster.create_capture("c")
    await cluster.create_pod(labels={"app": "web"})
    await cluster.waits(uid)
    await cluster.send(100)
    await cluster.reported_as(uid, "Capturing", packets=100)
    await cluster.stop_agent()
    cluster.environment["MIN_FREE_BYTES"] = str(1 << 50)  # no disk has that
    await cluster.start_agent()
    pressed = await cluster.reported_as(uid, "Error", "DiskPressure", packets=100)
    assert (pressed.pods, pressed.matched) == (0, 1)
    assert cluster.capturer.report() == ()

    async def emptied() -> bool:
        return await cluster.files(uid) == []

    await eventually(emptied)
    await cluster.stop_agent()
    cluster.environment["MIN_FREE_BYTES"] = "0"
    await cluster.start_agent()
    again = await cluster.reported_as(uid, "Capturing", packets=100)
    assert (again.evicted, again.interruptions) == (1, 1), "the pause found nothing to stop"


async def test_captures_follow_labels_and_the_opt_out(cluster: World) -> None:
    uid = await cluster.create_capture("c")
    await cluster.create_pod(labels={"app": "db"})

    async def relabel(labels: dict[str, str | None]) -> None:
        patch = {"metadata": {"labels": labels}}
        await cluster.client.patch(PODS, "web-0", patch, namespace=cluster.namespace)

    await relabel({"app": "web"})
    await cluster.waits(uid)
    await cluster.send(10)
    await relabel({"app": "db"})
    stopped = await cluster.reported_as(uid, "WaitingForTraffic", "NoPodMatches", packets=10)
    assert (stopped.pods, stopped.files) == (0, 1)
    await cluster.send(10)  # nobody looks
    await relabel({"app": "web", "kubepcap.io/capture": "deny"})
    await cluster.reported_as(uid, "Error", "OptedOut")
    await relabel({"kubepcap.io/capture": None})
    await cluster.reported_as(uid, "Capturing", packets=10)
    await cluster.send(5)
    await cluster.reported_as(uid, "Capturing", packets=15)
    label = {"metadata": {"labels": {"kubepcap.io/capture": "deny"}}}
    await cluster.client.patch(NAMESPACES, cluster.namespace, label)
    await cluster.reported_as(uid, "Error", "OptedOut", packets=15)
    assert sorted(file["packets"] for file in await cluster.files(uid)) == [5, 10]


async def test_a_capture_that_no_one_stamped_or_admitted_takes_nothing(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    unstamped = await cluster.create_capture("unstamped", stamped=False)
    waiting = await cluster.create_capture("waiting", admitted=False)
    admitted = await cluster.create_capture("admitted")
    await cluster.waits(admitted)
    assert await cluster.reported(waiting) is None
    assert await cluster.files(unstamped) == await cluster.files(waiting) == []
    assert {status.target.capture_uid for status in cluster.capturer.report()} == {admitted}


async def test_suspending_and_the_end_time_stop_a_capture_and_keep_its_files(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(3)
    await cluster.change_capture("c", {"suspend": True})
    await cluster.reported_as(uid, "Scheduled", "Suspended", packets=3)
    end = (datetime.now(UTC) + timedelta(seconds=3)).strftime("%Y-%m-%dT%H:%M:%SZ")
    await cluster.change_capture("c", {"suspend": False, "endTime": end})
    await cluster.reported_as(uid, "Finished", "EndTimeReached", packets=3)
    assert [file["state"] for file in await cluster.files(uid)] == ["Finished"] * 2
    assert cluster.capturer.report() == ()


async def test_an_agent_that_is_killed_takes_up_where_it_was(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    gone = await cluster.create_capture("gone")
    await cluster.waits(uid)
    await cluster.waits(gone)
    cluster.process.kill()
    await cluster.process.wait()
    await cluster.send(50)  # the capturer goes on alone
    await cluster.client.delete(PACKETCAPTURES, "gone", namespace=cluster.namespace)
    await cluster.start_agent()
    await cluster.reported_as(uid, "Capturing", packets=50)
    assert [file["packets"] for file in await cluster.files(uid)] == [50]

    async def removed() -> bool:
        return not (cluster.capturer.captures / gone).exists()

    await eventually(removed)


async def test_a_worker_that_is_killed_loses_no_packet_of_before(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(50)
    await cluster.reported_as(uid, "Capturing", packets=50)
    os.kill(cluster.capturer.worker_pid(), signal.SIGKILL)

    async def finished() -> bool:
        return [file["state"] for file in await cluster.files(uid)] == ["Finished", "Writing"]

    await eventually(finished)
    await cluster.send(20)
    again = await cluster.reported_as(uid, "Capturing", packets=70)
    assert [file["packets"] for file in await cluster.files(uid)] == [50, 20]
    assert again.interruptions == 1
    assert again.interrupted_at is not None
    node = CaptureNode.model_validate(await cluster.client.get(CAPTURENODES, NODE))
    assert node.status.capturer is not None
    assert (node.status.capturer.restarts, node.status.capturer.interfaces) == (1, 1)
    shown = await cluster.metrics()
    assert (shown["packets_total"], shown["capturer_restarts_total"], shown["interruptions_total"]) == (70, 1, 1)
    assert (shown["interfaces"], shown["recovered_files_total"], shown["files"]) == (1, 1, 2)
    assert shown["report_writes_total"] > 0


async def test_when_agent_and_worker_are_killed_the_counts_are_those_of_the_files(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c", rotation={"maxFiles": 100, "maxFileSize": "300k"})
    await cluster.waits(uid)
    await cluster.send(1000)
    await cluster.reported_as(uid, "Capturing", packets=1000)
    cluster.process.kill()
    await cluster.process.wait()
    await cluster.send(500)  # nobody tells the agent of these
    await eventually(cluster.flushed)
    os.kill(cluster.capturer.worker_pid(), signal.SIGKILL)
    cluster.capturer.read_to_end()
    cluster.capturer.connect()
    await cluster.start_agent()
    await cluster.captures(1)
    found = await cluster.reported_as(uid, "Capturing", packets=1500)
    files = await cluster.files(uid)
    assert sum(file["packets"] for file in files) == 1500
    assert found.interruptions == 1
    await cluster.stop_agent()
    await cluster.start_agent()
    await cluster.captures(1)
    await cluster.send(7)
    again = await cluster.reported_as(uid, "Capturing", packets=1507)
    assert again.interruptions == 2, "an agent that ends stops its captures"


async def test_a_second_agent_of_the_node_does_nothing_until_the_first_is_gone(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    first = cluster.process
    cluster.environment |= {"HEALTH_PORT": str(free_port()), "PORT": str(free_port()), "POD_NAME": "agent-2"}
    await cluster.start_agent()

    async def refused() -> bool:
        return (await cluster.ask_health("readyz")).startswith("node: another agent is at work on this node")

    await eventually(refused)
    node = await cluster.client.get(CAPTURENODES, NODE)
    assert node["status"]["pod"] == "agent-1"
    first.kill()
    await first.wait()

    async def taken_over() -> bool:
        node = await cluster.client.get(CAPTURENODES, NODE)
        return bool(node["status"]["pod"] == "agent-2")

    await eventually(taken_over)
    await cluster.send(3)
    assert (await cluster.reported_as(uid, "Capturing", packets=3)).interruptions == 0


async def test_an_end_that_moves_restarts_nothing_and_one_that_passed_unseen_is_kept(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    soon, later = (
        (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ") for seconds in (3, 600)
    )
    uid = await cluster.create_capture("c", endTime=soon)
    await cluster.waits(uid)
    await cluster.change_capture("c", {"endTime": later})

    async def passed() -> bool:
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") > soon

    await eventually(passed)
    await cluster.send(5)
    await cluster.reported_as(uid, "Capturing", packets=5)
    soon = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    await cluster.change_capture("c", {"endTime": soon})

    async def moved() -> bool:
        return [status.target.until for status in cluster.capturer.report()] == [
            datetime.fromisoformat(soon).timestamp()
        ]

    await eventually(moved)
    cluster.process.kill()
    await cluster.process.wait()

    async def ended() -> bool:
        return [status.state for status in cluster.capturer.report()] == [State.STOPPED]

    await eventually(ended)  # with no agent there
    await cluster.send(5)
    await cluster.start_agent()
    found = await cluster.reported_as(uid, "Finished", "EndTimeReached", packets=5)
    assert found.interruptions == 0
    assert [(file["packets"], file["state"]) for file in await cluster.files(uid)] == [(5, "Finished")]


async def test_over_its_policys_limit_a_capture_loses_its_oldest_files_and_no_other_does(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    cluster.limits = Limits(max_bytes_per_node=50_000)
    small = await cluster.create_capture("small", rotation={"maxFiles": 100, "maxFileSize": "10k"}, snapLength=256)
    cluster.limits = Limits()
    other = await cluster.create_capture("other", rotation={"maxFiles": 100, "maxFileSize": "10k"}, snapLength=256)
    await cluster.waits(small)
    await cluster.waits(other)
    await cluster.send(1000)

    async def evicted() -> bool:
        found = await cluster.reported(small)
        return found is not None and found.packets == 1000 and found.evicted > 0

    await eventually(evicted)

    async def within() -> bool:
        return bool(sum(file["size"] for file in await cluster.files(small)) <= 50_000)

    await eventually(within)
    assert (await cluster.reported_as(small, "Capturing", packets=1000)).pods == 1
    assert (await cluster.reported_as(other, "Capturing", packets=1000)).evicted == 0
    assert sum(file["packets"] for file in await cluster.files(other)) == 1000


async def test_a_filter_that_lets_nothing_through_is_told_with_what_was_seen(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c", filters=[{"protocol": "TCP", "ports": [1]}])
    await cluster.waits(uid)
    await cluster.send(100)

    async def told() -> bool:
        found = await cluster.reported(uid)
        return found is not None and found.reason == "FilterMatchedNothing" and found.seen >= 100

    await eventually(told)
    found = await cluster.reported(uid)
    assert found is not None
    assert found.message == f"filter matched 0 of {found.seen:,} packets seen on 1 pod"


async def test_an_agent_that_ends_leaves_finished_files_with_their_hashes(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(7)
    assert await cluster.stop_agent() == 0
    (record,) = (cluster.capturer.captures / uid).glob("*.pcap.json")
    written = json.loads(record.read_text())
    assert (written["packets"], written["recovered"], len(written["sha256"])) == (7, False, 64)
    await cluster.start_agent()

    await cluster.captures(1)
    await cluster.send(2)
    again = await cluster.reported_as(uid, "Capturing", packets=9)
    assert again.interruptions == 1


async def test_a_pod_that_ends_as_a_whole_leaves_finished_files_too(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(7)
    cluster.capturer.process.terminate()  # kubelet ends both containers at once
    assert await cluster.stop_agent() == 0
    (record,) = (cluster.capturer.captures / uid).glob("*.pcap.json")
    written = json.loads(record.read_text())
    assert (written["packets"], written["recovered"], len(written["sha256"])) == (7, False, 64)
