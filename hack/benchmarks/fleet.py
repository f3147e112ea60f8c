"""Many agents in one process, for `hack/bench scale`: what agents compute and write is real, what they capture is not.

Planning, summaries and reports are the agent's own code, for each node by itself. Captures and pods are followed once
for the whole process, as a thousand parsers would need a thousand nodes; `listeners` are the watches that the agents
would have of their own, whose events are received and thrown away.
"""

import argparse
import asyncio
import random
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from agent import reconcile
from agent.capturer.protocol import State, Target, TargetStatus
from agent.pods import Pod, parse_pod
from agent.report import Intervals, Reporter
from agent.summary import Files, summarize
from agent.tally import Count, Counters
from api.capturenode import Capturer, Disk
from hack.clusters.api import Api
from kube.client import PACKETCAPTURES, PODS, Client, Json
from kube.serve import run
from kube.watch import Cache, Key, Signal

NAMESPACE: Final = "dev"
_AGENTS_PER_CLIENT: Final = 25
_BURST_SECONDS: Final = 0.02
_CHUNK: Final = 1 << 18
_DISK: Final = Disk(capacity=100 << 30, free=80 << 30, used=1 << 30)


def node_name(index: int) -> str:
    """The name of a simulated node."""
    return f"node-{index:04}"


class Agent:
    """One node's agent without a capturer: each target captures at once, and a packet passes every few seconds."""

    def __init__(self, client: Client, node: str, *, intervals: Intervals) -> None:
        self.changed = Signal()
        self.pods: dict[str, Pod] = {}
        self._captures: dict[str, tuple[reconcile.Capture, reconcile.Capture]] = {}
        self._statuses: dict[str, TargetStatus] = {}
        self._counters_seconds = intervals.counters
        self._reporter = Reporter(client, node=node, pod=f"agent-{node}", version="bench", intervals=intervals)

    async def run(self, captures: Mapping[Key, reconcile.Capture]) -> None:
        """Report for ever; started at a time of its own, as agents are."""
        began = time.monotonic() - random.uniform(0, self._counters_seconds)  # noqa: S311
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reporter.run(), name="report")
            while True:
                self._report(captures, packets=1 + int((time.monotonic() - began) / self._counters_seconds))
                since = (time.monotonic() - began) % self._counters_seconds
                await self.changed.wait(self._counters_seconds - since)
                await asyncio.sleep(_BURST_SECONDS)

    def _report(self, captures: Mapping[Key, reconcile.Capture], *, packets: int) -> None:
        plan = reconcile.plan(
            self._own(captures),
            list(self.pods.values()),
            namespaces_opted_out=(),
            now=datetime.now(UTC),
            limits=reconcile.NodeLimits(),
        )
        facts, status = [], self._status(plan.targets)
        for capture in plan.captures:
            total = Count(packets=packets, seen=packets) if capture.targets else Count()
            counters, files = Counters(earlier=total), Files(len(capture.targets), 100 * packets)
            facts.append(summarize(capture, status=status, counters=counters, files=files))
        capturer = Capturer(interfaces=len(plan.targets), ring_bytes=sum(t.ring_bytes for t in plan.targets.values()))
        told = [fact for fact in facts if fact is not None]
        self._reporter.update(told, disk=_DISK, capturer=capturer, agents=plan.agents)

    def _own(self, captures: Mapping[Key, reconcile.Capture]) -> list[reconcile.Capture]:
        """The captures as this agent alone would have read them: an order remembers what it made of its node's pods."""
        known, self._captures = self._captures, {}
        for capture in captures.values():
            before = known.get(capture.uid)
            if before is None or before[0] is not capture:
                order = capture.order
                own = replace(order, known={}) if isinstance(order, reconcile.Order) else order
                before = capture, replace(capture, order=own)
            self._captures[capture.uid] = before
        return [own for _, own in self._captures.values()]

    def _status(self, targets: Mapping[str, Target]) -> Callable[[str], TargetStatus | None]:
        self._statuses = {
            target.id: self._statuses.get(target.id) or TargetStatus(target=target, started=1, state=State.CAPTURING)
            for target in targets.values()
        }
        return self._statuses.get


def _placed(document: Json) -> tuple[str, Pod]:
    """A pod with its node's name."""
    return document["spec"]["nodeName"], parse_pod(document)


async def work(arguments: argparse.Namespace) -> NoReturn:
    """Be the agents of these nodes."""
    intervals = Intervals()
    names = [node_name(index) for index in range(arguments.first, arguments.first + arguments.count)]
    async with AsyncExitStack() as connected:

        async def connect() -> Client:
            client = Client.connect(user_agent="kubepcap-agent", kubeconfig=arguments.kubeconfig)
            return await connected.enter_async_context(client)

        client = await connect()
        # Real agents never wait for each other's connections.
        writers = [await connect() for _ in range(0, len(names), _AGENTS_PER_CLIENT)]
        agents = {
            name: Agent(writers[index // _AGENTS_PER_CLIENT], name, intervals=intervals)
            for index, name in enumerate(names)
        }

        def all_changed(_: object) -> None:
            for agent in agents.values():
                agent.changed.set()

        captures = Cache(client, PACKETCAPTURES, reconcile.parse_capture, on_change=all_changed)
        pods_changed = Signal()
        pods = Cache(client, PODS, _placed, on_change=lambda _: pods_changed.set())

        async def hand_out_pods() -> NoReturn:
            """Give each agent its node's pods; the cache tells of all of them."""
            while True:
                await pods_changed.wait()
                for (_, name), (node, pod) in list(pods.objects.items()):
                    agent = agents.get(node)
                    if agent is not None and agent.pods.get(name) is not pod:
                        agent.pods[name] = pod
                        agent.changed.set()
                await asyncio.sleep(_BURST_SECONDS)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(captures.run(), name="captures")
            tasks.create_task(pods.run(), name="pods")
            tasks.create_task(hand_out_pods(), name="pods of each node")
            await captures.synced()
            await pods.synced()
            for name, agent in agents.items():
                tasks.create_task(agent.run(captures.objects), name=name)
    raise AssertionError


async def listen(arguments: argparse.Namespace) -> NoReturn:
    """Hold the watches that these agents would have, and read what comes."""
    server = Api(arguments.kubeconfig)

    async def follow(path: str) -> NoReturn:
        request = f"GET {path} HTTP/1.1\r\nHost: {server.address.netloc}\r\nAccept: application/json\r\n\r\n".encode()
        while True:
            # A thousand handshakes at once would be another benchmark.
            await asyncio.sleep(random.uniform(0, 2))  # noqa: S311
            with suppress(OSError, ssl.SSLError):
                reader, writer = await asyncio.open_connection(
                    server.address.hostname, server.address.port, ssl=server.tls, limit=_CHUNK
                )
                writer.write(request)
                while await reader.read(_CHUNK):
                    pass
                writer.close()

    async with asyncio.TaskGroup() as tasks:
        for index in range(arguments.first, arguments.first + arguments.count):
            node = node_name(index)
            watch = "watch=1&timeoutSeconds=3600&allowWatchBookmarks=true"
            tasks.create_task(follow(f"{PACKETCAPTURES.path()}?{watch}"), name=f"captures for {node}")
            tasks.create_task(follow(f"{PODS.path()}?{watch}&fieldSelector=spec.nodeName%3D{node}"), name=node)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack.benchmarks.fleet")
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first node")
    parser.add_argument("--count", type=int, required=True, help="of nodes")
    parser.add_argument("--listen", action="store_true", help="hold watches only")
    arguments = parser.parse_args()
    run("fleet", lambda: (listen if arguments.listen else work)(arguments))


if __name__ == "__main__":
    main()
