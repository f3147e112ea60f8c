"""The command line of hack/cluster."""

import argparse
import os
import subprocess
import sys

from hack.clusters import lifecycle
from hack.clusters.cluster import DEFAULT_NAME, valid_name
from hack.clusters.failure import Failure
from hack.clusters.install import install
from hack.clusters.keeper import entering
from hack.clusters.kubectl import environment


def main() -> None:
    arguments = parse(sys.argv[1:])
    try:
        run(arguments)
    except Failure as failure:
        sys.exit(f"hack/cluster: {failure}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"hack/cluster: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def parse(arguments: list[str]) -> argparse.Namespace:
    def name(text: str) -> str:
        try:
            return valid_name(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(prog="hack/cluster", description="A real two-node Kubernetes on this machine.")
    default = os.environ.get("KUBEPCAP_CLUSTER") or DEFAULT_NAME
    about_name = "which cluster, so that several can stand side by side (default: $KUBEPCAP_CLUSTER or kubepcap)"
    parser.add_argument("--name", type=name, default=default, help=about_name)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, help_text in (
        ("up", "start it; on the first start its programs are built, which takes minutes"),
        ("down", "end it, with everything it runs"),
        ("status", "say how it is; exit 1 when it is not up and well"),
        ("install", "build stale images, load them, apply manifests/ and wait until all is ready"),
    ):
        subparser = commands.add_parser(command, help=help_text)
        subparser.add_argument("--name", type=name, default=argparse.SUPPRESS, help=about_name)
    run_parser = commands.add_parser("run", help="run a command with this cluster's KUBECONFIG and kubectl")
    on_parser = commands.add_parser("on", help="run a command inside a node, or inside control-plane")
    on_parser.add_argument("machine", metavar="NODE")
    for subparser in (run_parser, on_parser):
        subparser.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD…")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "up":
            cluster = lifecycle.up(arguments.name)
            print(f"export KUBECONFIG={cluster.kubeconfig}")
        case "down":
            lifecycle.down(arguments.name)
        case "status":
            sys.exit(0 if lifecycle.status(arguments.name) else 1)
        case "install":
            install(lifecycle.running_cluster(arguments.name))
        case "run":
            execute(arguments.argv, environment(lifecycle.running_cluster(arguments.name)))
        case "on":
            cluster = lifecycle.running_cluster(arguments.name)
            execute(entering(cluster, arguments.machine) + arguments.argv, environment(cluster), given=arguments.argv)


def execute(command: list[str], variables: dict[str, str], *, given: list[str] | None = None) -> None:
    if not (command if given is None else given):
        raise Failure("no command to run")
    try:
        os.execvpe(command[0], command, variables)  # noqa: S606
    except FileNotFoundError:
        raise Failure(f"{command[0]}: no such command") from None


if __name__ == "__main__":
    main()
