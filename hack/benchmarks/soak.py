"""`hack/soak`: a program of the node is killed again and again under traffic, and every packet accounted for."""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hack.benchmarks import engines
from hack.clusters.bare import bare_control_plane
from hack.clusters.failure import Failure
from tests.cluster.conftest import teach
from tests.faults.scenario import Victim, scenario


async def soak(arguments: argparse.Namespace, directory: Path) -> int:
    """Play all rounds; returns how many went wrong."""
    wrong = 0
    played: Counter[str] = Counter()
    with bare_control_plane(directory / "control-plane") as plane:
        teach(plane)
        async with scenario(plane, directory) as made:
            for number in range(arguments.rounds):
                victim = Victim(arguments.faults[number % len(arguments.faults)])
                seed = f"{arguments.seed}/{number}"
                outcome = await made.play(victim, chance=random.Random(seed), rate=arguments.rate)  # noqa: S311
                complaints = outcome.complaints()
                said = outcome.said
                print(
                    f"{number + 1:4} seed {seed}: {victim} killed after {outcome.killed_after:.3f} s; "
                    f"sent {outcome.sent.sent:,}, in files {outcome.counted.numbered:,}, lost {outcome.lost:,}, "
                    f"dropped {said.dropped:,}, interruptions {said.interruptions}: {'WRONG' if complaints else 'ok'}",
                    flush=True,
                )
                for complaint in complaints:
                    print(f"       {complaint}", flush=True)
                played[victim] += 1
                wrong += bool(complaints)
    print(f"{', '.join(f'{count} × {victim}' for victim, count in played.items())}; {wrong} went wrong")
    return wrong


def main() -> None:
    victims = [str(victim) for victim in Victim]
    parser = argparse.ArgumentParser(prog="hack/soak", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"whom to kill, of: {', '.join(victims)}")
    parser.add_argument("--rounds", type=int, default=100, help="kills in all, the faults taking turns (default: 100)")
    parser.add_argument("--rate", type=int, default=100_000, help="packets a second (default: 100000)")
    parser.add_argument("--seed", default=None, help="what the moments are made of; a printed one to see them again")
    arguments = parser.parse_args()
    if unknown := [fault for fault in arguments.faults if fault not in victims]:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(victims)}")
    arguments.faults = arguments.faults or victims
    arguments.seed = arguments.seed or str(random.SystemRandom().randrange(10**6))
    if os.geteuid() != 0:
        sys.exit("hack/soak: network namespaces need root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was made is removed
    try:
        engines.require()
        with tempfile.TemporaryDirectory(prefix="kubepcap-soak-", ignore_cleanup_errors=True) as place:
            (Path(place) / "control-plane").mkdir()
            sys.exit(1 if asyncio.run(soak(arguments, Path(place))) else 0)
    except (Failure, subprocess.SubprocessError) as failure:
        sys.exit(f"hack/soak: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
