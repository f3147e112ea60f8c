"""`hack/bench api`: how long the list of a capture's files takes, beside a list of the Go sample server's."""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from hack.benchmarks import process
from hack.benchmarks.caller import Called, Calls
from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Goal, Outcome, Spread
from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.binaries import HACK
from hack.clusters.failure import Failure
from kube.client import Json
from tests.cluster.aggregated import GROUP, SMALL, Server, World, create_capture, installed
from tests.cluster.sample import GROUP as SAMPLE_GROUP
from tests.cluster.sample import RBAC, sample_server
from tests.cluster.sample import VERSION as SAMPLE_VERSION

SUMMARY: Final = "p50 and p99 of the list of a capture's files, beside a list of the Go sample server's"
METHOD: Final = (
    "Through kube-apiserver as its client, and directly as its front proxy would ask; {count} calls a round, over kept "
    "connections, rounds taking turns. Ours reads the capture from kube-apiserver and asks one node's agent (a "
    "stand-in in the benchmark's process) for every list; the sample server reads ten objects from its etcd.\n"
    "p50 and p99 are of each round, the median and range of them shown. What authentication and authorization add is "
    "read from a clock around the two in the real program, under these very calls, caches warm; discovery and health "
    "differ by little else and are shown for comparison."
)

OURS_THROUGH: Final = "kubepcap: files, through kube-apiserver"
OURS: Final = "kubepcap: files, directly"
DISCOVERY: Final = "kubepcap: discovery, directly"
HEALTH: Final = "kubepcap: health, directly"
SAMPLE_THROUGH: Final = "sample-apiserver: flunders, through kube-apiserver"
SAMPLE: Final = "sample-apiserver: flunders, directly"

_MOST_ADDED: Final = 0.001
_FLUNDERS: Final = 10
_PATIENCE: Final = 300.0
_SAMPLE_LIST: Final = f"/apis/{SAMPLE_GROUP}/{SAMPLE_VERSION}/namespaces/dev/flunders"


@dataclass(slots=True)
class Measured:
    """Seconds of calls, a list for each round, and CPU seconds that its server spent on all that it was asked."""

    rounds: list[list[float]] = field(default_factory=list)
    cpu: float = 0.0
    asked: int = 0

    def percentile(self, percent: int) -> Spread:
        """Of each round, in milliseconds."""
        return Spread.of(1000 * percentile(times, percent) for times in self.rounds)


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that so many per cent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10, help="of each kind of call (default: 10)")
    parser.add_argument("--count", type=int, default=200, help="calls a round (default: 200)")
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[1, 8], help="at once, one number after the other (default: 1 8)"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure. Raises Failure."""
    outcome = Outcome("hack/bench api", Machine.describe(), METHOD.format(count=arguments.count))
    with tempfile.TemporaryDirectory(prefix="kubepcap-bench-") as place:
        directory = Path(place)
        with bare_control_plane(directory) as plane:
            asyncio.run(_measure(plane, directory, outcome, arguments))
    return outcome


async def _measure(plane: BareControlPlane, directory: Path, outcome: Outcome, arguments: argparse.Namespace) -> None:
    clock = directory / "times.json"
    async with installed(plane, directory, program=("-m", "hack.benchmarks.timed", clock)) as world:
        world.agents["node-1"].files = {SMALL: b"packets"}
        await create_capture(world, "dev", "bench", nodes=["node-1"])
        flunders = [f"flunder-{number}" for number in range(_FLUNDERS)]
        async with sample_server(
            world, directory, reviewing=plane.kubeconfig, rights=_rights(), flunders=flunders
        ) as sample:
            kinds = _kinds(world, sample.server, directory)
            pids = {name: sample.pid if name in (SAMPLE, SAMPLE_THROUGH) else world.process.pid for name in kinds}
            for connections in arguments.connections:
                measured: defaultdict[str, Measured] = defaultdict(Measured)
                for number in range(arguments.rounds):
                    for name in _turn(list(kinds), number):
                        calls = replace(kinds[name], connections=connections, count=arguments.count)
                        before = process.cpu_seconds(pids[name])
                        measured[name].rounds.append((await _called(calls)).times)
                        measured[name].asked += calls.asked
                        measured[name].cpu += process.cpu_seconds(pids[name]) - before
                outcome.rows += [_row(name, connections, measured[name]) for name in kinds]
        world.process.terminate()
        await world.process.wait()
    outcome.goals.append(added(json.loads(clock.read_text())))


def _kinds(world: World, sample: Server, directory: Path) -> dict[str, Calls]:
    """What is asked, in the order of the table."""
    world.plane.authority.issue("alice").write(directory, "alice")
    world.plane.front_proxy.issue("front-proxy-client").write(directory, "proxy")
    files = f"{GROUP}/namespaces/dev/packetcaptures/bench/files"

    def calls(server: Server, path: str, who: str) -> Calls:
        headers = {"X-Remote-User": "alice", "X-Remote-Group": "system:authenticated"} if who == "proxy" else {}
        return Calls(
            address=server.address,
            port=server.port,
            name=server.name,
            ca=server.ca,
            certificate=directory / f"{who}.crt",
            key=directory / f"{who}.key",
            path=path,
            headers=headers,
        )

    return {
        OURS_THROUGH: calls(world.kube_apiserver, files, "alice"),
        SAMPLE_THROUGH: calls(world.kube_apiserver, _SAMPLE_LIST, "alice"),
        OURS: calls(world.apiserver, files, "proxy"),
        SAMPLE: calls(sample, _SAMPLE_LIST, "proxy"),
        DISCOVERY: calls(world.apiserver, GROUP, "proxy"),
        HEALTH: calls(world.apiserver, "/healthz", "proxy"),
    }


async def _called(calls: Calls) -> Called:
    """The outcome of a round, made by a process of its own. Raises Failure when any call was not answered 200."""
    caller = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hack.benchmarks.caller", cwd=HACK.parent,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_PATIENCE):
            said, complaint = await caller.communicate(calls.to_json().encode())
    finally:
        with suppress(ProcessLookupError):
            caller.kill()
    if caller.returncode:
        raise Failure(f"calls of {calls.path} failed: {complaint.decode(errors='replace')}")
    called = Called(**json.loads(said))
    if called.codes.keys() != {"200"}:
        raise Failure(f"calls of {calls.path} were answered {called.codes}")
    return called


def _turn(names: list[str], number: int) -> list[str]:
    """The names in another order each round, so that none always comes after the same one."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def _row(name: str, connections: int, measured: Measured) -> dict[str, Spread | str | float]:
    mean = statistics.fmean(seconds for times in measured.rounds for seconds in times)
    return {
        "call": name,
        "connections": connections,
        "p50 ms": measured.percentile(50),
        "p99 ms": measured.percentile(99),
        "calls/s": round(connections / mean),
        "server's CPU ms": round(1000 * measured.cpu / measured.asked, 2),
    }


def added(times: list[float]) -> Goal:
    """Whether seconds that requests spent in both steps keep what was promised."""
    median = statistics.median(times)
    return Goal(
        "authentication and authorization with warm caches add less than 1 ms at the median",
        f"{1000 * median:.3f} ms (p99 {1000 * percentile(times, 99):.3f} ms) of {len(times):,} requests",
        median < _MOST_ADDED,
    )


def _rights() -> list[Json]:
    """That of alice to list what the sample server serves."""
    role = {"apiGroup": RBAC, "kind": "Role", "name": "flunders"}
    return [
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": role["kind"],
            "metadata": {"name": role["name"], "namespace": "dev"},
            "rules": [{"apiGroups": [SAMPLE_GROUP], "resources": ["flunders"], "verbs": ["list"]}],
        },
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": role["name"], "namespace": "dev"},
            "roleRef": role,
            "subjects": [{"apiGroup": RBAC, "kind": "User", "name": "alice"}],
        },
    ]
