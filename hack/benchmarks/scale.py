"""`hack/bench scale`: a thousand nodes report a hundred captures to a real kube-apiserver and the real leader."""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from api import stamp
from api.capturepolicy import Limits
from api.packetcapture import PacketCaptureSpec, PacketCaptureStatus
from controller.conditions import counted
from hack.benchmarks import process
from hack.benchmarks.fleet import NAMESPACE, node_name
from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Cell, Goal, Outcome
from hack.clusters.api import Api
from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.binaries import HACK
from hack.clusters.failure import Failure
from hack.clusters.kubectl import Kubectl
from hack.clusters.ports import free_port
from kube.client import CAPTURENODES, NAMESPACES, NODES, PACKETCAPTURES, PODS, Client, Json, Resource
from kube.status import StatusError
from kube.watch import Cache

SUMMARY: Final = "time and API writes until a hundred captures' statuses are right with a thousand nodes"
METHOD: Final = (
    "kube-apiserver, etcd and our leader as they are; of the agents all but capturing, in {processes} processes, with "
    "{watches} watches of captures and of pods besides.\n"
    "Everything shares this machine's cores, which in a cluster the agents would not. Writes are those of kubepcap, "
    "refused ones too, not the benchmark's own of pods, nodes and captures; kube-apiserver is asked for them every "
    "second. Where it took longer to answer, all that was written meanwhile may have been in one second.\n"
    "A status is right when it names all pods and nodes, in its conditions as well, and nothing is degraded."
)

PROJECT: Final = HACK.parent
SERVICEACCOUNTS: Final = Resource("", "v1", "serviceaccounts", "ServiceAccount", namespaced=True)
AGENT: Final = "system:serviceaccount:kubepcap:kubepcap-agent"
CONTROLLER: Final = "system:serviceaccount:kubepcap:kubepcap-controller"
ACCOUNTS: Final = ("system:serviceaccounts", "system:serviceaccounts:kubepcap", "system:authenticated")

_LONGEST_SECONDS: Final = 30.0
_MOST_WRITES: Final = 200
_LONGEST_SAMPLE: Final = 1.5
_MOST_LEADER_MEMORY: Final = 300_000_000
_CONCLUSIONS: Final[Mapping[str, str]] = {
    "Admitted": "True",
    "Capturing": "True",
    "PodsMatched": "True",
    "Degraded": "False",
}
_PATIENCE: Final = 300.0
_AT_ONCE: Final = 50
_WRITES: Final = frozenset({"POST", "PUT", "PATCH", "APPLY", "DELETE"})
_OF_THE_BENCHMARK: Final = frozenset({"pods", "nodes", "namespaces", "serviceaccounts", "clusterrolebindings"})


@dataclass(frozen=True, slots=True)
class Right:
    """What a capture's status must say."""

    pods: int
    nodes: int

    def fits(self, status: PacketCaptureStatus) -> bool:
        """Whether everyone has reported, and what is concluded from it is said."""
        reported = len(status.nodes) + status.more_nodes
        found = {condition.type: condition.status for condition in status.conditions}
        matched = status.condition("PodsMatched")
        return (
            (status.phase, status.pods, reported) == ("Capturing", self.pods, self.nodes)
            and _CONCLUSIONS.items() <= found.items()
            and matched is not None
            and matched.message.startswith(f"{counted(self.pods, 'pod')} match")
        )


Writes = Mapping[tuple[str, str], int]
"""Writes by resource and HTTP status code."""


def writes(metrics: str) -> Writes:
    """Writes of kubepcap's programs, whatever came of them, out of kube-apiserver's own metrics."""
    found: Counter[tuple[str, str]] = Counter()
    for match in re.finditer(r"^apiserver_request_total\{([^}]*)\} (\S+)$", metrics, re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        resource = "/".join(filter(None, (labels["resource"], labels["subresource"])))
        by_the_benchmark = labels["resource"] in _OF_THE_BENCHMARK or (resource, labels["verb"]) == (
            "packetcaptures",
            "POST",
        )
        if labels["verb"] in _WRITES and not by_the_benchmark:
            found[resource, labels["code"]] += int(float(match[2]))
    return found


@dataclass(frozen=True, slots=True)
class Peak:
    """The writes of the busiest second: so many at least; at most more, where kube-apiserver did not answer in time."""

    at_least: int
    at_most: int

    def __str__(self) -> str:
        return f"{self.at_least:,}" if self.at_least == self.at_most else f"{self.at_least:,} to {self.at_most:,}"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written in a time."""

    by_resource: Mapping[str, int]
    refused: Mapping[str, int]
    """By resource and code, of those that did not succeed; they are in `by_resource` as well."""
    peak: Peak

    @classmethod
    def of(cls, samples: Sequence[tuple[float, Writes]]) -> Self:
        """From samples, each the time in seconds and what had been written until then."""
        by_resource: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        first, last = samples[0][1], samples[-1][1]
        for (resource, code), number in last.items():
            since = number - first.get((resource, code), 0)
            by_resource[resource] += since
            if not code.startswith("2"):
                refused[f"{resource} {code}"] += since
        return cls(+by_resource, +refused, _peak(samples))


def _peak(samples: Sequence[tuple[float, Writes]]) -> Peak:
    """Of a time that is much longer than a second, any second may have had all of its writes."""
    at_least = at_most = 0
    for (at_before, before), (at_after, after) in itertools.pairwise(samples):
        number, seconds = sum(after.values()) - sum(before.values()), at_after - at_before
        a_second = round(number / max(seconds, 1))
        at_least = max(at_least, a_second)
        at_most = max(at_most, number if seconds > _LONGEST_SAMPLE else a_second)
    return Peak(at_least, at_most)


@dataclass(slots=True)
class Sampler:
    """Asks kube-apiserver every second how much was written."""

    api: Api
    samples: list[tuple[float, Writes]] = field(default_factory=list)

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            with suppress(OSError, http.client.HTTPException):  # too busy to answer: the next sample spans more
                await self.sample()
            due = max(due + 1, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def sample(self) -> None:
        """Raises OSError, http.client.HTTPException."""
        metrics = await asyncio.to_thread(self.api.get, "/metrics")
        self.samples.append((time.monotonic(), writes(metrics)))

    async def sample_at_last(self) -> None:
        """A sample of now, however long that takes. Raises Failure."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                return await self.sample()
            await asyncio.sleep(0.1)
        raise Failure("kube-apiserver does not say its metrics")

    def since(self, start: float) -> Written:
        return Written.of([sample for sample in self.samples if sample[0] >= start])


@dataclass(slots=True)
class World:
    """A control plane with nodes and pods, our leader, and the agents."""

    client: Client
    sampler: Sampler
    api_pid: int
    leader: subprocess.Popen[bytes]
    leader_log: Path
    fleet_pids: list[int]
    statuses: Cache[PacketCaptureStatus]
    nodes: int
    captures: int

    @property
    def leader_pid(self) -> int:
        """Raises Failure when the leader has ended: what comes after would measure nothing."""
        if self.leader.poll() is not None:
            raise Failure("the leader ended", log=self.leader_log)
        return self.leader.pid

    async def wait_for(self, right: Right) -> None:
        def all_fit() -> bool:
            fitting = sum(right.fits(status) for status in self.statuses.objects.values())
            return bool(self.leader_pid) and fitting == self.captures

        await eventually("all statuses are right", all_fit)

    def cpu(self) -> tuple[float, float, float]:
        """CPU seconds so far of kube-apiserver, of the leader, and of what stands for the agents."""
        fleet = sum(process.cpu_seconds(pid) for pid in self.fleet_pids)
        return process.cpu_seconds(self.api_pid), process.cpu_seconds(self.leader_pid), fleet

    async def phase(self, name: str, work: Callable[[], Awaitable[None]]) -> tuple[dict[str, Cell], Peak]:
        """Do the work, and say what it cost; the writes of the busiest second once more as numbers."""
        print(f"{name}…", file=sys.stderr, flush=True)
        await self.sampler.sample_at_last()
        start, before = self.sampler.samples[-1][0], self.cpu()
        await work()
        seconds = time.monotonic() - start
        await self.sampler.sample_at_last()
        after = self.cpu()
        written = self.sampler.since(start)
        number = sum(written.by_resource.values())
        api, leader, fleet = (round(end - begin, 1) for begin, end in zip(before, after, strict=True))
        row: dict[str, Cell] = {
            "phase": name,
            "seconds": round(seconds, 1),
            "writes": number,
            "refused": sum(written.refused.values()),
            "writes/s": round(number / seconds, 1),
            "busiest second": str(written.peak),
            "kube-apiserver CPU s": api,
            "its RSS MiB": process.peak_rss(self.api_pid) >> 20,
            "leader CPU s": leader,
            "leader RSS MiB": process.peak_rss(self.leader_pid) >> 20,
            "agents CPU s": fleet,
            "by resource": _told(written.by_resource),
            "refused by resource and code": _told(written.refused) or None,
        }
        return row, written.peak


async def eventually(what: str, condition: Callable[[], bool]) -> None:
    """Wait until it is so. Raises Failure when that takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"waited {_PATIENCE:.0f} s in vain until {what}")
        await asyncio.sleep(0.05)


async def concurrently(work: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Do all of it, so many at once."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(each: Callable[[], Awaitable[object]]) -> None:
        async with gate:
            await each()

    async with asyncio.TaskGroup() as tasks:
        for number, each in enumerate(work):
            tasks.create_task(one(each), name=f"{number}")


def capture(name: str) -> Json:
    """A PacketCapture with the stamp that the webhook would have given it."""
    spec = {"selector": "app == 'web'"}
    given = stamp.Stamp(
        user="bench",
        policy="bench",
        limits=Limits(max_captures_per_namespace=10_000, max_duration=timedelta(days=1)),
        namespace=NAMESPACE,
        spec_hash=stamp.spec_hash(PacketCaptureSpec.model_validate(spec)),
    )
    metadata = {"name": name, "annotations": {stamp.ANNOTATION: given.to_annotation()}}
    return {
        "apiVersion": PACKETCAPTURES.api_version,
        "kind": PACKETCAPTURES.kind,
        "metadata": metadata,
        "spec": spec,
    }


async def create_pod(client: Client, index: int, number: int, *, app: str) -> None:
    """The object of a running pod. No kubelet looks at it."""
    name = pod_name(index, number)
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": app}},
        "spec": {
            "nodeName": node_name(index),
            "containers": [{"name": "c", "image": "none.invalid/none"}],
            "automountServiceAccountToken": False,
            "tolerations": [{"operator": "Exists"}],
        },
    }
    await client.create(PODS, body, namespace=NAMESPACE)
    address = f"10.{128 + number}.{index // 250}.{1 + index % 250}"
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
    await client.patch(PODS, name, {"status": status}, namespace=NAMESPACE, subresource="status")


def pod_name(index: int, number: int) -> str:
    return f"web-{index:04}-{number}"


async def populate(client: Client, nodes: int) -> None:
    """Namespaces, nodes, and two pods on each, one of which is matched."""
    for name in ("kubepcap", NAMESPACE):
        await client.create(NAMESPACES, {"metadata": {"name": name}})
    await client.create(SERVICEACCOUNTS, {"metadata": {"name": "default"}}, namespace=NAMESPACE)
    await concurrently(
        lambda index=index: client.create(NODES, {"metadata": {"name": node_name(index)}})  # type: ignore[misc]
        for index in range(nodes)
    )
    await concurrently(
        lambda index=index, number=number, app=app: create_pod(client, index, number, app=app)  # type: ignore[misc]
        for index in range(nodes)
        for number, app in enumerate(("web", "other"))
    )


@contextlib.contextmanager
def program(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of our programs as a process that lives as long as the block."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "--", sys.executable, "-m", *command],
            cwd=PROJECT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@asynccontextmanager
async def world(plane: BareControlPlane, arguments: argparse.Namespace) -> AsyncIterator[World]:
    """All of it, once every agent has said that it is there."""
    kubectl = Kubectl(plane.kubeconfig)
    crds = f"--filename={PROJECT / 'manifests' / 'crds'}"
    kubectl("apply", crds)
    kubectl("wait", "--for=condition=Established", crds, "--timeout=30s")
    kubectl("apply", f"--filename={PROJECT / 'manifests' / 'flowcontrol.yaml'}")
    for user in (AGENT, CONTROLLER):
        name = f"bench-{user.rpartition(':')[2]}"
        kubectl("create", "clusterrolebinding", name, "--clusterrole=cluster-admin", f"--user={user}")
    agents, controller = (str(plane.kubeconfig_for(user, *ACCOUNTS)) for user in (AGENT, CONTROLLER))
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(user_agent="bench", kubeconfig=plane.kubeconfig))
        print(f"{arguments.nodes} nodes with two pods each…", file=sys.stderr, flush=True)
        await populate(client, arguments.nodes)
        leader = stack.enter_context(
            program(
                plane.directory / "controller.log",
                "controller",
                KUBECONFIG=controller,
                POD_NAME="bench",
                POD_NAMESPACE="kubepcap",
                HEALTH_PORT=str(free_port()),
            )
        )
        share = -(-arguments.nodes // arguments.processes)
        shares: list[tuple[int, int, list[str]]] = [
            (first, min(share, arguments.nodes - first), []) for first in range(0, arguments.nodes, share)
        ]
        if arguments.watches:
            shares.append((0, arguments.watches, ["--listen"]))
        members = [
            stack.enter_context(
                program(
                    plane.directory / f"fleet-{number}.log",
                    "hack.benchmarks.fleet",
                    f"--kubeconfig={agents}",
                    f"--first={first}",
                    f"--count={count}",
                    *options,
                )
            )
            for number, (first, count, options) in enumerate(shares)
        ]
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        statuses = Cache(client, PACKETCAPTURES, _status)
        present = Cache(client, CAPTURENODES, lambda document: document["metadata"]["name"], metadata_only=True)
        sampler = Sampler(Api(plane.kubeconfig))
        background = [
            tasks.create_task(each.run(), name=name)
            for name, each in (("statuses", statuses), ("nodes", present), ("samples", sampler))
        ]
        try:
            await eventually("every agent reports", lambda: len(present.objects) == arguments.nodes)
            await eventually("statuses can be followed", lambda: statuses.is_synced)
            await asyncio.sleep(3)  # the listeners' handshakes
            for member in [leader, *members]:
                if member.poll() is not None:
                    raise Failure("a program ended", log=plane.directory / "controller.log")
            yield World(
                client=client,
                sampler=sampler,
                api_pid=_child("kube-apiserver"),
                leader=leader,
                leader_log=plane.directory / "controller.log",
                fleet_pids=[member.pid for member in members],
                statuses=statuses,
                nodes=arguments.nodes,
                captures=arguments.captures,
            )
        finally:
            for task in background:
                task.cancel()


async def measure(plane: BareControlPlane, arguments: argparse.Namespace, outcome: Outcome) -> None:
    """Create, let counters count, change all pods."""
    nodes, captures = arguments.nodes, arguments.captures
    async with world(plane, arguments) as made:

        async def create() -> None:
            await concurrently(
                lambda number=number: made.client.create(  # type: ignore[misc]
                    PACKETCAPTURES, capture(f"capture-{number:03}"), namespace=NAMESPACE
                )
                for number in range(captures)
            )
            await made.wait_for(Right(pods=nodes, nodes=nodes))

        async def change() -> None:
            patch = {"metadata": {"labels": {"app": "web"}}}
            await concurrently(
                lambda index=index: made.client.patch(  # type: ignore[misc]
                    PODS, pod_name(index, 1), patch, namespace=NAMESPACE
                )
                for index in range(nodes)
            )
            await made.wait_for(Right(pods=2 * nodes, nodes=nodes))

        async def count() -> None:
            await asyncio.sleep(arguments.steady)

        peaks = []
        for name, work in (
            (f"{captures} captures created", create),
            ("counters only", count),
            ("all pods changed", change),
            ("counters only, after", count),
        ):
            row, peak = await made.phase(name, work)
            outcome.rows.append(row)
            peaks.append(peak)
        outcome.goals += goals(outcome.rows, peaks, leader_memory=process.peak_rss(made.leader_pid))


def goals(rows: Sequence[Mapping[str, Cell]], peaks: Sequence[Peak], *, leader_memory: int) -> list[Goal]:
    """What is promised."""
    found = []
    for row in (rows[0], rows[2]):
        seconds = float(str(row["seconds"]))
        text = f"statuses right in under {_LONGEST_SECONDS:.0f} s ({row['phase']})"
        found.append(Goal(text, f"{seconds} s", seconds < _LONGEST_SECONDS))
    peak = Peak(max(peak.at_least for peak in peaks), max(peak.at_most for peak in peaks))
    reached = peak.at_most < _MOST_WRITES or (None if peak.at_least < _MOST_WRITES else False)
    found.append(Goal(f"under {_MOST_WRITES} writes in any second", str(peak), reached))
    memory = f"{leader_memory / 1e6:.0f} MB"
    found.append(Goal("leader under 300 MB", memory, leader_memory < _MOST_LEADER_MEMORY))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1000, help="agents (default: 1000)")
    parser.add_argument("--captures", type=int, default=100, help="captures, each matching a pod of every node")
    parser.add_argument("--processes", type=int, default=2, help="that the agents share (default: 2)")
    parser.add_argument("--watches", type=int, default=None, help="watches beside them (default: one for each agent)")
    parser.add_argument("--steady", type=float, default=40, help="seconds in which only counters change (default: 40)")
    parser.add_argument("--keep-logs", type=Path, default=None, help="a directory for the programs' logs")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure. Raises Failure."""
    if arguments.watches is None:
        arguments.watches = arguments.nodes
    method = METHOD.format(processes=arguments.processes, watches=arguments.watches)
    outcome = Outcome("hack/bench scale", Machine.describe(), f"{method} {arguments.nodes} nodes.")
    with contextlib.ExitStack() as stack:
        directory = arguments.keep_logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kubepcap-")))
        directory.mkdir(parents=True, exist_ok=True)
        plane = stack.enter_context(bare_control_plane(directory))
        try:
            asyncio.run(measure(plane, arguments, outcome))
        except* StatusError as group:
            raise Failure(f"kube-apiserver refused: {group.exceptions[0]}") from group
        except* Failure as group:
            print(outcome.text(), file=sys.stderr)  # what was measured until then
            raise Failure(str(group.exceptions[0])) from group
    return outcome


def _status(document: Json) -> PacketCaptureStatus:
    return PacketCaptureStatus.model_validate(document.get("status") or {})


def _told(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {number}" for what, number in sorted(numbers.items()))


def _child(name: str) -> int:
    """The process of this name that this one has started."""
    for task in Path("/proc/self/task").iterdir():
        for pid in task.joinpath("children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return int(pid)
    raise Failure(f"{name} does not run")
