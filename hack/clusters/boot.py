"""PID 1 of a machine: `python -m hack.clusters.boot CLUSTER MACHINE`, started by the keeper in new namespaces."""

import sys

from hack.clusters import node, server
from hack.clusters.cluster import CONTROL_PLANE, Cluster
from hack.clusters.machine import Machine


def main(cluster: str, name: str) -> None:
    machine = Machine(Cluster.load(cluster), name)
    machine.isolate()
    if not sys.stdin.readline():  # the keeper says when the network is there
        sys.exit("the keeper ended before the network was made")
    if name == CONTROL_PLANE:
        server.run(machine)
    else:
        node.run(machine)
    machine.stay()


if __name__ == "__main__":
    main(*sys.argv[1:])
