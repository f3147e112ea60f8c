"""The command line of hack/bench."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys

from hack.benchmarks import api, capture, idle, scale, start, webhook
from hack.clusters.failure import Failure

BENCHMARKS = {"capture": capture, "idle": idle, "start": start, "scale": scale, "api": api, "webhook": webhook}


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench", description="What kubepcap costs, measured on this machine.")
    commands = parser.add_subparsers(dest="benchmark", metavar="NAME")
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        command.add_argument("--json", action="store_true", help="print JSON")
        module.add_arguments(command)
    arguments = parser.parse_args()
    if arguments.benchmark is None:
        parser.print_help()
        return
    if os.geteuid() != 0:
        sys.exit("hack/bench: network namespaces need root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was made is removed
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what starting a cluster says is no part of the outcome
            outcome = BENCHMARKS[arguments.benchmark].run(arguments)
    except (Failure, subprocess.SubprocessError) as failure:
        sys.exit(f"hack/bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(outcome.json() if arguments.json else outcome.text())


if __name__ == "__main__":
    main()
