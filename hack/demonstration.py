"""hack/demo: the whole story on a real cluster. Each step shows the command a user would type, runs and checks it."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hack.clusters import lifecycle
from hack.clusters.binaries import HACK
from hack.clusters.cluster import DEFAULT_NAME, Cluster, valid_name
from hack.clusters.failure import Failure
from hack.clusters.install import install
from hack.clusters.keeper import entering
from hack.clusters.kubectl import Kubectl, environment
from hack.clusters.workloads import deploy

PROJECT = HACK.parent
PATIENCE = 30
SHOWN_LINES = 16
FILES = "/apis/subresources.kubepcap.io/v1/namespaces/{namespace}/packetcaptures/{name}/files"
NGINX = ("dev", "nginx-pcap")
CATALOGUE = ("hipstershop", "hipstershop-capture-productcatalogservice")
CONNECTIONS = 20


class Stage:
    """Where the story is told: says, runs and checks. A command that does not do what was expected is a Failure."""

    def __init__(self, cluster: Cluster, *, directory: Path) -> None:
        self._environment = environment(cluster)
        self._directory = directory
        self.kubectl = Kubectl(cluster.kubeconfig)

    def say(self, text: str) -> None:
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(f"\n{bold}# {text}{plain}", flush=True)

    def run(self, command: str, *, expect: str = "", fails: bool = False, lines: int = SHOWN_LINES) -> str:
        """Show a command, run it in bash, show its output; `expect` must be in it, and `fails` says how it must end."""
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
        output = done.stdout.splitlines()
        for line in output[:lines]:
            print(f"    {line}", flush=True)
        if len(output) > lines:
            print(f"    … ({len(output) - lines} lines more)", flush=True)
        if (done.returncode != 0) != fails:
            wanted = "fail" if fails else "succeed"
            raise Failure(f"that command should {wanted}; it ended with {done.returncode}:\n{done.stdout[-2000:]}")
        if expect not in done.stdout:
            raise Failure(f"that command should have said {expect!r}; it said:\n{done.stdout[-2000:]}")
        return done.stdout

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > deadline:
                raise Failure(f"waited {PATIENCE} s in vain until {what}")
            time.sleep(0.2)

    def files(self, capture: tuple[str, str]) -> list[dict[str, Any]]:
        """The files of a capture as they are listed now; a node that does not answer is a Failure."""
        answer = json.loads(self.kubectl("get", "--raw", path_of(capture)).stdout)
        if answer["unanswered"]:
            raise Failure(f"these nodes did not answer: {answer['unanswered']}")
        items: list[dict[str, Any]] = answer["items"]
        return items


def path_of(capture: tuple[str, str]) -> str:
    namespace, name = capture
    return FILES.format(namespace=namespace, name=name)


def tell(stage: Stage, cluster: Cluster) -> None:
    """The story, once the cluster is up and the project installed."""
    start_captures(stage)
    drive_traffic(stage)
    downloads = download(stage)
    read_packets(stage, downloads)
    refuse_the_viewer(stage, downloads)
    delete(stage, cluster)


def start_captures(stage: Stage) -> None:
    stage.say("Who may do what is plain RBAC: an operator, readers of files, and a viewer who gets nothing of packets.")
    stage.run("kubectl apply -f manifests/examples/rbac.yaml")
    stage.say("A capture is an object; here is the operator's, and it takes no more than `kubectl apply`.")
    stage.run("cat manifests/examples/nginx-pcap.yaml")
    stage.run("kubectl --as operator apply -f manifests/examples/nginx-pcap.yaml")
    stage.run("kubectl apply -f manifests/examples/hipstershop-capture-productcatalogservice.yaml")
    stage.say("A bad one is refused with a sentence that says what to change.")
    bad = "sed 's/name: .*/name: bad/; s/ports: .*/ports: [70000]/' manifests/examples/nginx-pcap.yaml"
    stage.run(f"{bad} | kubectl --as operator apply --dry-run=server -f -", fails=True, expect="70000")
    stage.say("Within moments the pods that match are captured: two of nginx, one on each node, and the catalogue.")
    for (namespace, name), pods in ((NGINX, 2), (CATALOGUE, 1)):
        ready = f"--for=jsonpath='{{.status.pods}}'={pods} --timeout={PATIENCE}s"
        stage.run(f"kubectl -n {namespace} wait packetcapture/{name} {ready}")
    stage.run("kubectl get packetcaptures -A")


def drive_traffic(stage: Stage) -> None:
    stage.say("Some traffic: the catalogue is asked from another node, and nginx from two pods.")
    knock = "kubectl -n dev exec netshoot -- nc -zv productcatalogservice.hipstershop 3550"
    stage.run(f"for i in {{1..{CONNECTIONS}}}; do {knock}; done", expect="succeeded", lines=3)
    ask = "kubectl -n dev exec {pod} -- curl -sS -o /dev/null -w '%{{http_code}}\\n' http://nginx-svc/"
    for pod in ("centos", "netshoot"):
        stage.run(f"for i in {{1..10}}; do {ask.format(pod=pod)}; done", expect="200", lines=2)


def download(stage: Stage) -> dict[str, dict[str, Any]]:
    """List and fetch every file; returns the files by the path they were saved to."""
    asked = path_of(NGINX)
    nodes = {"node-a", "node-b"}
    stage.wait(
        "packets of nginx are in the files of both nodes",
        lambda: {file["node"] for file in stage.files(NGINX) if file["packets"]} == nodes,
    )
    handshakes = 3 * CONNECTIONS
    stage.wait(
        "the packets to the catalogue are in its file",
        lambda: sum(file["packets"] for file in stage.files(CATALOGUE)) >= handshakes,
    )
    stage.say(
        "The files, listed through kube-apiserver: those of both nodes, with what was captured and what was lost."
    )
    stage.run(f"kubectl --as operator get --raw {asked} | python3 -m json.tool", expect='"dropped": 0', lines=24)
    stage.say("Each is downloaded with `kubectl get --raw`; no exec, no privileged pod, no second login.")
    saved: dict[str, dict[str, Any]] = {}
    for capture in (NGINX, CATALOGUE):
        for file in stage.files(capture):
            name = f"{capture[1]}-{file['node']}-{len(saved)}.pcap"
            who = "--as operator " if capture == NGINX else ""
            stage.run(f"kubectl {who}get --raw {shlex.quote(file['url'])} > {name}")
            saved[name] = file
    return saved


def read_packets(stage: Stage, downloads: dict[str, dict[str, Any]]) -> None:
    stage.say("They are ordinary pcap files. What nginx was asked:")
    asked = {name for name in downloads if name.startswith(NGINX[1])}
    text = "".join(stage.run(f"tcpdump -Anr {name} 2>&1 | cat -v", lines=40) for name in sorted(asked))
    if "GET / HTTP/1.1" not in text:
        raise Failure("no HTTP request is in the files of nginx")
    stage.say("And the catalogue's first packets, in hexadecimal:")
    (catalogue,) = set(downloads) - asked
    stage.run(f"tcpdump -Xnr {catalogue} -c 3 2>&1", expect="3550", lines=14)
    stage.say(f"All {CONNECTIONS} connections are there, and nothing that the capture did not ask for.")
    opened = f"tcpdump -nr {catalogue} 'tcp dst port 3550 and tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn' 2>/dev/null"
    if int(stage.run(f"{opened} | wc -l").split()[-1]) < CONNECTIONS:
        raise Failure(f"fewer than {CONNECTIONS} connections are in {catalogue}")
    for name in sorted(downloads):
        port = 80 if name in asked else 3550
        stage.run(f"test $(tcpdump -nr {name} 'not tcp port {port}' 2>/dev/null | wc -l) = 0")


def refuse_the_viewer(stage: Stage, downloads: dict[str, dict[str, Any]]) -> None:
    stage.say("The viewer sees pods, and neither captures nor files.")
    stage.run("kubectl --as viewer -n dev get pods", expect="netshoot")
    stage.run("kubectl --as viewer -n dev get packetcaptures", fails=True, expect="Forbidden")
    file = next(file for name, file in downloads.items() if name.startswith(NGINX[1]))
    stage.run(f"kubectl --as viewer get --raw {path_of(NGINX)}", fails=True, expect="Forbidden")
    stage.run(f"kubectl --as viewer get --raw {shlex.quote(file['url'])}", fails=True, expect="Forbidden")


def delete(stage: Stage, cluster: Cluster) -> None:
    stage.say("With a capture go its files, on every node.")
    for namespace, name in (NGINX, CATALOGUE):
        stage.run(f"kubectl -n {namespace} delete packetcapture {name}")
    stage.run(f"kubectl --as operator get --raw {path_of(NGINX)}", fails=True, expect="NotFound")
    for node in cluster.nodes:
        look = f"hack/cluster on {node} find /var/lib/kubepcap -name '*.pcap'"
        stage.wait(f"no file is left on {node}", lambda node=node: not _left(cluster, node))  # type: ignore[misc]
        stage.run(f"{look} | wc -l", expect="0")


def _left(cluster: Cluster, node: str) -> str:
    command = entering(cluster, node)
    find = ["find", "/var/lib/kubepcap", "-name", "*.pcap"]
    return subprocess.run([*command, *find], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/demo", description="The whole story on a real two-node Kubernetes.")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up, with everything in it")
    keep = parser.parse_args().keep
    name = valid_name(os.environ.get("KUBEPCAP_CLUSTER") or DEFAULT_NAME)
    was_up = lifecycle.running(name)
    started = time.monotonic()
    try:
        subprocess.run([HACK / "packages", "tcpdump"], check=True)
        print("# A real Kubernetes with two nodes, on this machine alone.\n$ hack/cluster up", flush=True)
        cluster = lifecycle.up(name)
        try:
            demonstrate(cluster)
            print(f"\n# That was all of it, in {time.monotonic() - started:.0f} s.")
        finally:
            if not keep and not was_up:
                lifecycle.down(name)
    except (Failure, subprocess.SubprocessError) as failure:
        sys.exit(f"\nhack/demo: {failure}")
    print(how_to_go_on(cluster, up=keep or was_up))


def demonstrate(cluster: Cluster) -> None:
    print("\n# kubepcap, installed in it.\n$ hack/cluster install", flush=True)
    install(cluster)
    with tempfile.TemporaryDirectory(prefix="kubepcap-demo-") as place:
        directory = Path(place)
        for shown in ("manifests", "hack"):
            (directory / shown).symlink_to(PROJECT / shown)
        stage = Stage(cluster, directory=directory)
        stage.say("Workloads to look at.")
        deploy(stage.kubectl)
        stage.run("kubectl apply -k manifests/demo", lines=0)
        stage.run("kubectl get pods -A -o wide | grep -E '^(NAMESPACE|dev|hipstershop)'", expect="netshoot")
        tell(stage, cluster)


def how_to_go_on(cluster: Cluster, *, up: bool) -> str:
    if not up:
        return "\nThe cluster is gone again. To play with it: hack/demo --keep"
    return f"""
The cluster is still up. To go on:
    export KUBECONFIG={cluster.kubeconfig}
    kubectl apply -f manifests/examples/nginx-pcap.yaml
    kubectl get --raw {path_of(NGINX)}
hack/cluster run bash gives a shell with the right kubectl, and hack/cluster down ends it."""


if __name__ == "__main__":
    main()
