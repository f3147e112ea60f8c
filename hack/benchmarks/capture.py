"""`hack/bench capture`: our capturer, tcpdump and dumpcap in turn on the same traffic; every file is read back."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hack.benchmarks import engines, process
from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Cell, Goal, Outcome, Spread
from hack.benchmarks.wire import Sent, Wire, count, file_system, wire
from hack.clusters.cluster import cache

SUMMARY: Final = "packets, losses and CPU of our capturer, beside tcpdump and dumpcap"
METHOD: Final = (
    "A veth pair between two network namespaces. CPU is of the capturing process, user and system, from the moment it "
    "listens until it was told to stop and has written all; memory is its peak until then.\n"
    "Sent is what the veth took. Exact: what was written and what was reported as dropped are together what was "
    "sent, and the files hold what was written.\n"
    "Median (lowest–highest) of the repeats, in which the engines take turns, another one first each time; the ratio "
    "is to tcpdump's median."
)

OURS: Final = "kubepcap"
DIRECT: Final = "kubepcap, direct"
TCPDUMP: Final = "tcpdump"
DUMPCAP: Final = "dumpcap"
ENGINES: Final[Mapping[str, engines.Engine]] = {
    OURS: engines.ours,
    DIRECT: engines.ours_direct,
    TCPDUMP: engines.tcpdump,
    DUMPCAP: engines.dumpcap,
}

_SETTLE_SECONDS: Final = 1.5  # tcpdump's kernel hands a block over every second
_READY_SECONDS: Final = 0.1
_FASTEST: Final = 0
_CHEAP_FROM_RATE: Final = 200_000


@dataclass(frozen=True, slots=True)
class Case:
    """Traffic, and where it is written. `rate` 0 is as fast as it goes; `rotating` is 10 MB × 4."""

    size: int
    rate: int
    place: str
    ring_mib: int = 4
    rotating: bool = False

    def __str__(self) -> str:
        rate = f"{self.rate // 1000}k/s" if self.rate else "fastest"
        files = ", 10 MB × 4" if self.rotating else ""
        return f"{self.size} B {rate}, {self.place}{files}, ring {self.ring_mib} MiB"

    @property
    def engines(self) -> list[str]:
        """Writing past the page cache means nothing where there is no disk."""
        return [name for name in ENGINES if name != DIRECT or self.place == "disk"]


CASES: Final = (
    Case(64, 100_000, "tmpfs"),
    Case(64, 400_000, "tmpfs"),
    Case(64, 400_000, "disk"),
    Case(64, _FASTEST, "tmpfs"),
    Case(64, _FASTEST, "tmpfs", ring_mib=16),
    Case(1514, 100_000, "disk"),
    Case(1514, 400_000, "tmpfs"),
    Case(1514, 400_000, "disk"),
    Case(1514, 400_000, "disk", ring_mib=16),
    Case(1514, 400_000, "disk", rotating=True),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one engine. CPU in seconds, `peak_rss` in bytes; `in_files` are distinct packets of the traffic."""

    sent: int
    refused: int
    rate: float
    written: int
    dropped: int
    in_files: int
    torn: int
    twice: int
    cpu: float
    peak_rss: int
    rotated: bool

    @property
    def is_exact(self) -> bool:
        """Whether the engine's account is true to the packet; of rotating files only the rest can be counted."""
        accounted = self.written + self.dropped == self.sent
        read = 0 < self.in_files <= self.written if self.rotated else self.in_files == self.written
        return accounted and read and not self.torn and not self.twice

    @property
    def lost_percent(self) -> float:
        return 100 * (self.sent - self.written) / self.sent

    @property
    def cpu_per_million(self) -> float:
        return self.cpu / self.written * 1e6


def measure(line: Wire, case: Case, engine: str, *, seconds: float, directory: Path) -> Run:
    """Run one engine once in a directory of its own, which is removed again. Raises Failure."""
    with tempfile.TemporaryDirectory(prefix="kubepcap-bench-", dir=directory) as place:
        setup = engines.Setup(ring=case.ring_mib << 20, directory=Path(place))
        if case.rotating:
            setup = replace(setup, file_bytes=10_000_000, files=4)
        with ENGINES[engine](line, setup) as recording:
            time.sleep(_READY_SECONDS)
            before = recording.cpu_seconds()
            sent = _send(line, case, seconds)
            time.sleep(_SETTLE_SECONDS)
            peak = process.peak_rss(recording.pid)
            total = recording.stop()
            cpu = recording.cpu_seconds() - before
            counted = count(recording.files())
    return Run(
        sent=sent.sent,
        refused=sent.refused,
        rate=sent.sent / sent.seconds,
        written=total.written,
        dropped=total.dropped,
        in_files=counted.numbered - counted.twice,
        torn=counted.torn + counted.headless,
        twice=counted.twice,
        cpu=cpu,
        peak_rss=peak,
        rotated=case.rotating,
    )


def _send(line: Wire, case: Case, seconds: float) -> Sent:
    if case.rate:
        return line.send(size=case.size, rate=case.rate, packets=round(case.rate * seconds))
    return line.send(size=case.size, rate=_FASTEST, seconds=seconds)


def row(case: Case, engine: str, runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Cell]:
    """A line of the table; `reference` are tcpdump's runs of the same case."""
    cpu = Spread.of(run.cpu_per_million for run in runs)
    ratio = cpu.median / Spread.of(run.cpu_per_million for run in reference).median
    return {
        "case": str(case),
        "engine": engine,
        "sent": Spread.of(run.sent for run in runs).median,
        "k/s": round(Spread.of(run.rate / 1000 for run in runs).median),
        "in files": Spread.of(run.in_files for run in runs).median,
        "dropped": Spread.of(run.dropped for run in runs),
        "lost %": Spread.of(run.lost_percent for run in runs),
        "exact": f"{sum(run.is_exact for run in runs)} of {len(runs)}",
        "CPU s/M": cpu,
        "ratio": ratio,
        "RSS MiB": round(Spread.of(run.peak_rss for run in runs).median / 2**20),
        "goals": " ".join(
            "ok" if goal.reached else f"MISSED({goal.text}: {goal.measured})"
            for goal in goals(case, engine, runs, reference)
        )
        or None,
    }


def goals(case: Case, engine: str, runs: Sequence[Run], reference: Sequence[Run]) -> list[Goal]:
    """What is promised for one case of ours."""
    if engine not in {OURS, DIRECT}:
        return []
    exact = sum(run.is_exact for run in runs)
    found = [Goal("exact in every run", f"{exact} of {len(runs)}", exact == len(runs))]
    lost = [Spread.of(run.lost_percent for run in each).median for each in (runs, reference)]
    found.append(Goal("no more loss than tcpdump", f"{lost[0]:.2f} % and {lost[1]:.2f} %", lost[0] <= lost[1]))
    if (most := _most_cpu(case, engine)) is not None:
        medians = [Spread.of(run.cpu_per_million for run in each).median for each in (runs, reference)]
        ratio = medians[0] / medians[1]
        found.append(Goal(f"CPU per packet at most {most} of tcpdump's", f"{ratio:.2f}", ratio <= most))
    return found


def _most_cpu(case: Case, engine: str) -> float | None:
    """The most CPU per packet that is allowed, as a part of tcpdump's; None where nothing is promised."""
    if case.size == 64:
        return 1.0 if case.rate == _FASTEST or case.rate >= _CHEAP_FROM_RATE else None
    if case.place != "disk":
        return None
    return 0.3 if engine == DIRECT else 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine in each case (default: 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of traffic in each run (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one repeat with a second of traffic")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose description has this text")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    parser.add_argument("--disk", type=Path, default=None, help="where files go that are to be on a disk")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="and those on a tmpfs")  # noqa: S108


def run(arguments: argparse.Namespace) -> Outcome:
    """Run all cases. Raises Failure."""
    cases = [case for case in CASES if arguments.only in str(case)]
    if arguments.list or not cases:
        print("\n".join(map(str, CASES)))
        sys.exit(0 if arguments.list else 2)
    engines.require()
    repeats, seconds = (1, 1.0) if arguments.quick else (arguments.repeats, arguments.seconds)
    places = {"disk": arguments.disk or cache() / "benchmarks", "tmpfs": arguments.tmpfs}
    places["disk"].mkdir(parents=True, exist_ok=True)
    types = ", ".join(f"{name} is {file_system(path)}" for name, path in places.items())
    outcome = Outcome(
        "hack/bench capture",
        Machine.describe("tcpdump", "dumpcap"),
        f"{METHOD}\n{repeats} repeats of {seconds:g} s; {types}.",
    )
    with wire() as line:
        for case in cases:
            runs = dict(_interleaved(line, case, repeats=repeats, seconds=seconds, directory=places[case.place]))
            for engine in case.engines:
                outcome.rows.append(row(case, engine, runs[engine], runs[TCPDUMP]))
            print(f"{case}: done", file=sys.stderr, flush=True)
    return outcome


def _interleaved(
    line: Wire, case: Case, *, repeats: int, seconds: float, directory: Path
) -> Iterator[tuple[str, list[Run]]]:
    """The engines take turns, so that what else the machine does meets all of them."""
    runs: dict[str, list[Run]] = {engine: [] for engine in case.engines}
    for engine in turns(case.engines, repeats=repeats):
        # Or the next one would pay for this one's writes; and of this file system alone, whatever ails another.
        subprocess.run(["sync", "--file-system", directory], check=True)
        runs[engine].append(measure(line, case, engine, seconds=seconds, directory=directory))
    return iter(runs.items())


def turns(names: Sequence[str], *, repeats: int) -> Iterator[str]:
    """All of them in each repeat, another one first each time: what comes after whom is no part of the result."""
    for repeat in range(repeats):
        first = repeat % len(names)
        yield from (*names[first:], *names[:first])
