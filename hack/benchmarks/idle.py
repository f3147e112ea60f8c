"""`hack/bench idle`: what a hundred captures cost while nothing happens."""

import argparse
import tempfile
import time
import uuid
from pathlib import Path
from typing import Final

from agent.capturer.protocol import State
from hack.benchmarks import engines, process
from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Goal, Outcome
from hack.benchmarks.wire import FILTER, Wire, wire
from hack.clusters.cluster import cache
from hack.clusters.failure import Failure
from tests.agent.world import Capturer

SUMMARY: Final = "memory and CPU of a worker with a hundred captures and no traffic"
METHOD: Final = (
    "One worker, all captures on one pod's interface. Rings are what the worker has resident of mappings of packet "
    "sockets; above is what it has resident besides."
)

_MOST_ABOVE: Final = 40_000_000
_MOST_PERCENT: Final = 0.5
_QUIET_SECONDS: Final = 2.0  # what starting leaves to be done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captures", type=int, default=100, help="captures in the worker (default: 100)")
    parser.add_argument("--seconds", type=float, default=30, help="over which CPU is measured (default: 30)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure with rings of 2 and 4 MiB. Raises Failure."""
    engines.require()
    outcome = Outcome("hack/bench idle", Machine.describe("tcpdump"), f"{METHOD} CPU over {arguments.seconds:g} s.")
    place = cache() / "benchmarks"
    place.mkdir(parents=True, exist_ok=True)
    with wire() as line:
        for ring_mib in (2, 4):
            with tempfile.TemporaryDirectory(prefix="kubepcap-bench-", dir=place) as directory:
                measure(line, outcome, ring_mib=ring_mib, directory=Path(directory), arguments=arguments)
    return outcome


def measure(line: Wire, outcome: Outcome, *, ring_mib: int, directory: Path, arguments: argparse.Namespace) -> None:
    """Add the row of one ring size, and its goals."""
    log = directory / "capturer.log"
    capturer = Capturer(directory, prefix=("sh", "-c", 'exec "$@" 2>"$0"', str(log)))
    try:
        for _ in range(arguments.captures):
            target = line.pod.target(
                capture_uid=str(uuid.uuid4()),
                filter=FILTER,
                snap_length=engines.SNAP_LENGTH,
                ring_bytes=ring_mib << 20,
            )
            status = capturer.start(target)
            if status.state is not State.CAPTURING:
                raise Failure(f"a capture does not start: {status.reason}: {status.message}")
        pid = capturer.worker_pid()
        time.sleep(_QUIET_SECONDS)
        before = process.cpu_seconds(pid)
        time.sleep(arguments.seconds)
        percent = 100 * (process.cpu_seconds(pid) - before) / arguments.seconds
        resident, rings = process.rss(pid), process.ring_rss(pid)
    finally:
        capturer.close()
    above = resident - rings
    outcome.rows.append(
        {
            "captures": arguments.captures,
            "ring MiB": ring_mib,
            "RSS MB": round(resident / 1e6, 1),
            "rings MB": round(rings / 1e6, 1),
            "above MB": round(above / 1e6, 1),
            "CPU %": round(percent, 3),
        }
    )
    which = f"{arguments.captures} captures, rings of {ring_mib} MiB"
    outcome.goals += [
        Goal(f"at most 40 MB above the rings ({which})", f"{above / 1e6:.1f} MB", above <= _MOST_ABOVE),
        Goal(f"under 0.5 % of a core ({which})", f"{percent:.3f} %", percent < _MOST_PERCENT),
    ]
