"""One fault: a program of the node is killed at some moment under traffic; then every packet is accounted for.

A real agent and a real capturer before a real kube-apiserver, a pod with numbered packets from the benchmarks'
generator. Whoever is killed is started again, as kubelet would; the worker has the capturer's first process for that.
"""

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from api.capturenode import NodeCapture
from hack.benchmarks.wire import FILTER, Counted, Sent, Wire, count, wire
from hack.clusters.bare import BareControlPlane
from kube.client import PACKETCAPTURES
from tests.agent import world
from tests.cluster.world import World, eventually, node

PACKET_BYTES: Final = 64
BEFORE_SECONDS: Final = (2.0, 3.5)
"""How long traffic goes on before the fault: at least so long that there is something which no kill may lose."""
AFTER_SECONDS: Final = 4.0
"""How long it goes on after the fault: well beyond the moment at which everything must be captured again."""
FLUSH_SECONDS: Final = 1.0
"""What a worker may lose at most of what it had captured before it was killed."""
BACK_SECONDS: Final = 2.0
"""After this at the latest whoever was killed captures again, counted from when it can be started again."""
MARGIN_SECONDS: Final = 0.5
"""What this machine may be late by, between a signal and the packet that goes over the wire at that moment."""


class Victim(StrEnum):
    """Whom to kill."""

    WORKER = "worker"
    CAPTURER = "capturer"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Round:
    """What came of one fault. Whom nobody but kubelet starts again was started `back_after` seconds of traffic."""

    victim: Victim
    killed_after: float
    back_after: float
    sent: Sent
    counted: Counted
    said: NodeCapture
    unreadable: tuple[str, ...]

    @property
    def lost(self) -> int:
        return self.sent.sent - self.counted.numbered

    def complaints(self) -> list[str]:
        """What is wrong with it; nothing when each packet is accounted for."""
        found = [f"tcpdump can't read {name}" for name in self.unreadable]
        counted, said = self.counted, self.said
        if counted.torn or counted.headless or counted.twice or counted.disordered:
            found.append(f"the files are not whole: {counted}")
        if said.packets != counted.packets:
            found.append(f"status says {said.packets} packets, the files hold {counted.packets}")
        found += self._not_captured()
        found += self._agent_killed() if self.victim is Victim.AGENT else self._capturing_interrupted()
        return found

    def _not_captured(self) -> list[str]:
        """Packets that have to be in the files whatever is said of drops: or a loss of all would pass as dropped."""
        missing, margin = _length(self._gaps()), MARGIN_SECONDS * self._rate
        excused = self._may_be_lost[1] - self._may_be_lost[0]
        found = []
        if missing > excused + (self.sent.sent - excused) / 2:
            found.append(f"only {self.counted.numbered} of {self.sent.sent} packets are in the files")
        if self.counted.lowest is None or self.counted.lowest - self.sent.first > margin:
            found.append(f"the first packets are in no file; the first that is: {self.counted.lowest}")
        if self.counted.highest is None or self._last - self.counted.highest > margin:
            found.append(f"the last packets, up to {self._last}, are in no file; the last: {self.counted.highest}")
        return found

    def _agent_killed(self) -> list[str]:
        """Nobody captures less for want of an agent."""
        if self.lost == self.said.dropped and not self.said.interruptions:
            return []
        return [
            f"{self.lost} packets are missing, {self.said.dropped} are said to be dropped, "
            f"and {self.said.interruptions} interruptions"
        ]

    def _capturing_interrupted(self) -> list[str]:
        """One gap, from a flush before the kill to the restart; status tells of it."""
        found = []
        if self.said.interruptions != 1 or self.said.interrupted_at is None:
            found.append(f"status tells of {self.said.interruptions} interruptions, there was one")
        earliest, latest = self._may_be_lost
        outside = [(first, last) for first, last in self._gaps() if first < earliest or last > latest]
        if _length(outside) > self.said.dropped:
            found.append(f"packets are missing that were not lost to the kill: {outside}; {self.said.dropped} dropped")
        return found

    @property
    def _rate(self) -> float:
        return self.sent.sent / self.sent.seconds

    @property
    def _last(self) -> int:
        return self.sent.first + self.sent.sent - 1

    @property
    def _may_be_lost(self) -> tuple[float, float]:
        """The numbers between which the kill may take packets away; those of an agent takes none."""
        if self.victim is Victim.AGENT:
            return self.sent.first, self.sent.first
        earliest = self.killed_after - FLUSH_SECONDS - MARGIN_SECONDS
        latest = self.back_after + BACK_SECONDS + MARGIN_SECONDS
        return self.sent.first + earliest * self._rate, self.sent.first + latest * self._rate

    def _gaps(self) -> list[tuple[int, int]]:
        """Ranges of numbers that are in no file, also before the first that is and after the last."""
        first, last = self.sent.first, self._last
        if self.counted.lowest is None or self.counted.highest is None:
            return [(first, last)]
        edges = [(first, self.counted.lowest - 1), (self.counted.highest + 1, last)]
        return [gap for gap in (edges[0], *self.counted.missing, edges[1]) if gap[0] <= gap[1]]


class Scenario:
    """A node under traffic, on which one fault follows the other."""

    def __init__(self, node: World, line: Wire, directory: Path) -> None:
        self.node = node
        self._line = line
        self._directory = directory
        self._rounds = 0

    async def play(self, victim: Victim, *, chance: random.Random, rate: int) -> Round:
        """Capture, kill at a random moment, and account for all packets once traffic has ended."""
        name, self._rounds = f"round-{self._rounds}", self._rounds + 1
        files = {"maxFileSize": "10M", "maxFiles": 10}
        uid = await self.node.create_capture(name, rotation=files)
        await self.node.reported_as(uid, "WaitingForTraffic", "NoPacketYet")
        wait = chance.uniform(*BEFORE_SECONDS)
        with self._line.traffic(size=PACKET_BYTES, rate=rate) as traffic:
            began = time.monotonic()
            await asyncio.sleep(wait)
            killed_after = time.monotonic() - began
            await self._kill(victim)
            back_after = time.monotonic() - began
            await asyncio.sleep(AFTER_SECONDS)
            sent = await asyncio.to_thread(traffic.stop)
        await self.node.change_capture(name, {"suspend": True})
        await self.node.reported_as(uid, "Scheduled", "Suspended")
        said = await self._settled(uid)
        kept = sorted((self.node.capturer.captures / uid).glob("*.pcap"), key=_begun)
        outcome = Round(victim, killed_after, back_after, sent, count(kept), said, tuple(_unreadable(kept)))
        if not outcome.complaints():
            await self.node.client.delete(PACKETCAPTURES, name, namespace=self.node.namespace)
        return outcome

    async def _kill(self, victim: Victim) -> None:
        match victim:
            case Victim.WORKER:
                os.kill(self.node.capturer.worker_pid(), signal.SIGKILL)
            case Victim.CAPTURER:
                first, worker = self.node.capturer.process, self.node.capturer.worker_pid()
                first.kill()
                first.wait()
                await asyncio.to_thread(self.node.capturer.read_to_end)
                await asyncio.to_thread(world.eventually, lambda: not Path(f"/proc/{worker}").exists())
                self.node.capturer = capturer_in(self._directory)
            case Victim.AGENT:
                self.node.process.kill()
                await self.node.process.wait()
                await self.node.start_agent()

    async def _settled(self, uid: str) -> NodeCapture:
        """What status says once all files are finished and it changes no more."""
        directory = self.node.capturer.captures / uid

        async def recorded() -> bool:
            names = {path.name for path in directory.iterdir()}
            return all(f"{name}.json" in names for name in names if name.endswith(".pcap"))

        await eventually(recorded)
        before: NodeCapture | None = None
        for _ in range(20):
            said = await self.node.reported(uid)
            if said is not None and said == before:
                return said
            before = said
            await asyncio.sleep(1.5)  # longer than the agent takes from one write of counters to the next
        raise AssertionError(f"status does not come to rest: {before}")


def capturer_in(directory: Path) -> world.Capturer:
    """A capturer whose words go to a file. One that has just begun has to take its socket over first."""
    directory.joinpath("capturer.sock").unlink(missing_ok=True)
    log = str(directory / "capturer.log")
    return world.Capturer(directory, prefix=("sh", "-c", 'exec "$@" 2>>"$0"', log))


@asynccontextmanager
async def scenario(plane: BareControlPlane, directory: Path) -> AsyncIterator[Scenario]:
    """A node with a running agent and capturer, and a pod that can be sent to."""
    with wire() as line:
        capturer = capturer_in(directory)
        async with node(plane, directory, pod=line.pod, capturer=capturer, LOG_LEVEL="ERROR") as made:
            await made.start_agent()
            try:
                await made.create_pod(labels={"app": "web"})
                yield Scenario(made, line, directory)
            finally:
                await made.stop_agent()
                made.capturer.close()


def _length(ranges: list[tuple[int, int]]) -> int:
    """How many numbers the ranges hold."""
    return sum(last - first + 1 for first, last in ranges)


def _begun(file: Path) -> int:
    return int(file.stem.rsplit("-", 1)[1])


def _unreadable(files: list[Path]) -> list[str]:
    """The files that tcpdump complains about."""
    found = []
    for file in files:
        done = subprocess.run(
            ["tcpdump", "--count", "-r", str(file), FILTER], capture_output=True, text=True, check=False
        )
        if done.returncode or "truncated" in done.stderr:
            found.append(file.name)
    return found
