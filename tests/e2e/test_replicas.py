"""Replicas of the apiserver go, willingly or not, while two hundred requests a second come."""

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest

from hack.clusters.api import Api
from hack.clusters.cluster import Cluster
from hack.clusters.keeper import entering
from hack.clusters.kubectl import Kubectl
from kube.client import Client, Json, Resource
from kube.watch import Cache, Key
from tests.e2e.captures import API, Capture, capturing, pods
from tests.load import Load

NAMESPACE = "kubepcap"
SELECTOR = "app.kubernetes.io/component=apiserver"
ENDPOINTSLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", namespaced=True)
RATE = 200
PATIENCE = 120.0


@dataclass
class Endpoints:
    """Which pods kube-apiserver sends requests to, and since when one is out of it, by the loop's clock."""

    slices: dict[Key, Json] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)

    @property
    def ready(self) -> set[str]:
        return {
            endpoint["targetRef"]["name"]
            for one in self.slices.values()
            for endpoint in one.get("endpoints") or []
            if endpoint["conditions"]["ready"]
        }

    def update(self, key: Key, one: Json | None) -> None:
        before = self.ready
        if one is None:
            self.slices.pop(key, None)
        else:
            self.slices[key] = one
        for pod in before - self.ready:
            self.gone.setdefault(pod, asyncio.get_running_loop().time())


@asynccontextmanager
async def following(cluster: Cluster) -> AsyncIterator[Endpoints]:
    endpoints = Endpoints()
    async with Client.connect(user_agent="test", kubeconfig=cluster.kubeconfig) as client:
        cache: Cache[Json] = Cache(
            client,
            ENDPOINTSLICES,
            dict,
            namespace=NAMESPACE,
            label_selector="kubernetes.io/service-name=kubepcap-apiserver",
            on_change=lambda key: endpoints.update(key, cache.objects.get(key)),
        )
        task = asyncio.create_task(cache.run(), name="following endpoints")
        try:
            await cache.synced()
            yield endpoints
        finally:
            task.cancel()


@asynccontextmanager
async def loaded(cluster: Cluster, capture: Capture) -> AsyncIterator[Load]:
    """One request in ten lists files, which asks nodes; the others end in the apiserver."""
    api = Api(cluster.kubeconfig)
    connector = aiohttp.TCPConnector(ssl=api.tls, limit=0)
    async with aiohttp.ClientSession(api.address.geturl(), connector=connector) as session:

        async def ask(number: int) -> str:
            path = capture.path if number % 10 == 0 else API
            async with session.get(path) as response:
                body = await response.read()
            if response.status != 200:
                return f"{path}: {response.status} {body.decode(errors='replace')}"
            kind = json.loads(body)["kind"]
            return "" if kind == ("APIResourceList" if path == API else "PacketCaptureFileList") else kind

        async with Load(ask, RATE) as load:
            await more(load)
            yield load


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not question():  # noqa: ASYNC110 - what is waited for is in the cluster
            await asyncio.sleep(0.05)


async def more(load: Load) -> None:
    """Until two seconds' requests more have been asked."""
    enough = load.asked + 2 * RATE
    await until(lambda: load.asked >= enough)


@pytest.fixture
def capture(kubectl: Kubectl) -> Iterator[Capture]:
    with capturing(kubectl, "loaded", "dev", selector='app == "nginx"') as capture:
        capture.wait_for_phase("Capturing", "WaitingForTraffic")
        yield capture


async def test_a_replica_that_is_told_to_go_leaves_no_request_unanswered(
    kubectl: Kubectl, cluster: Cluster, capture: Capture
) -> None:
    async with following(cluster) as endpoints:
        await until(lambda: len(endpoints.ready) == 2)
        leaving = min(endpoints.ready)
        async with loaded(cluster, capture) as load:
            await asyncio.to_thread(kubectl, "delete", "pod", leaving, f"--namespace={NAMESPACE}", "--wait=false")
            await until(lambda: leaving in endpoints.gone)
            await asyncio.to_thread(
                kubectl, "wait", "--for=delete", f"pod/{leaving}", f"--namespace={NAMESPACE}", "--timeout=90s"
            )
            await until(lambda: len(endpoints.ready) == 2)
            await more(load)
    assert not load.lapses
    assert load.asked > 4 * RATE


async def test_after_a_replica_is_killed_no_request_fails_once_its_endpoint_is_gone(
    kubectl: Kubectl, cluster: Cluster, capture: Capture
) -> None:
    async with following(cluster) as endpoints:
        await until(lambda: len(endpoints.ready) == 2)
        victim = min(endpoints.ready)
        found = pods(kubectl, NAMESPACE, SELECTOR)[victim]
        async with loaded(cluster, capture) as load:
            await asyncio.to_thread(kill, cluster, found["spec"]["nodeName"], found["metadata"]["uid"])
            await until(lambda: victim in endpoints.gone)
            await more(load)
            await until(lambda: len(endpoints.ready) == 2)
            await more(load)
    # kube-apiserver learns of it by a watch, as we do, and maybe a moment later.
    assert not [lapse for lapse in load.lapses if lapse.began > endpoints.gone[victim] + 0.2]


def kill(cluster: Cluster, node: str, uid: str) -> None:
    """SIGKILL for the program in the pod; its container is started again in the same pod."""
    find = (
        'for one in $(pgrep --full "^python3 -m apiserver"); do grep -q "$0" /proc/$one/cgroup && echo $one; done; true'
    )
    inside = entering(cluster, node)
    found = subprocess.run([*inside, "sh", "-c", find, f"pod{uid}"], capture_output=True, text=True, check=True)
    (program,) = found.stdout.split()
    subprocess.run([*inside, "kill", f"-{int(signal.SIGKILL)}", program], check=True)
