"""`hack/bench start`: how long it takes until the first packet is kept, beside what people do by hand today."""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Goal, Outcome, Spread
from hack.clusters import cgroups, lifecycle
from hack.clusters.api import Api
from hack.clusters.cluster import Cluster
from hack.clusters.failure import Failure
from hack.clusters.install import install
from hack.clusters.keeper import processes
from hack.clusters.kubectl import Kubectl, Process

SUMMARY: Final = "time from `kubectl apply` to the first packet on disk, beside kubectl debug and ksniff's way"
METHOD: Final = (
    "Two nodes on this machine; a pod sends and gets a packet every 5 ms all the while. From the start of the kubectl "
    "process until this machine sees the first packet in a file.\n"
    "kubectl debug: an ephemeral container with tcpdump --immediate-mode -U -w. ksniff's way: a privileged pod, then "
    "nsenter and tcpdump -U -w - through kubectl exec. Images are on the nodes already."
)

OURS: Final = "kubepcap: apply to first packet"
DEBUG: Final = "kubectl debug: to first packet"
SNIFF: Final = "privileged pod: to first packet"
CREATED: Final = "kubepcap: pod created to captured"
READY: Final = "kubepcap: pod ready to captured"
SILENT: Final = "kubepcap: delete to worker silent"

NAMESPACE: Final = "bench-start"
IMAGE: Final = "kubepcap.invalid/tools:dev"
NODE: Final = "node-a"
_GOAL_SECONDS: Final = 0.5
_PATIENCE: Final = 60.0
_POLL_SECONDS: Final = 0.003
_FILE_HEADER: Final = 24
_DEBUG_FILE: Final = "/tmp/debug.pcap"  # noqa: S108 - in a container of its own

T = TypeVar("T")


def until(what: str, look: Callable[[], T | None]) -> T:
    """What `look` finds once it finds something. Raises Failure."""
    deadline = time.monotonic() + _PATIENCE
    while not (found := look()):
        if time.monotonic() > deadline:
            raise Failure(f"waited {_PATIENCE:.0f} s in vain for {what}")
        time.sleep(_POLL_SECONDS)
    return found


def pod(name: str, *command: str, labels: dict[str, str], **spec: Any) -> str:
    """The manifest of a pod of ours."""
    container = {"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": list(command)}
    container |= spec.pop("container", {})
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [container], **spec},
        }
    )


def capture(name: str, app: str) -> str:
    """The manifest of a capture of the pods of this app."""
    return json.dumps(
        {
            "apiVersion": "kubepcap.io/v1",
            "kind": "PacketCapture",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"selector": f"app == '{app}'", "filters": [{"protocol": "ICMP"}]},
        }
    )


@dataclass(slots=True)
class Stage:
    """The cluster, seen from this machine. Times are in seconds."""

    cluster: Cluster
    kubectl: Kubectl
    api: Api
    directory: Path
    times: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def captures(self) -> Path:
        """Where the node's captures lie, through its mount namespace."""
        return Path(f"/proc/{processes(self.cluster)[NODE]}/root/var/lib/kubepcap/captures")

    def apply(self, manifest: str) -> Process:
        """Start `kubectl apply` and go on."""
        path = self.directory / "manifest.json"
        path.write_text(manifest)
        return self.kubectl.start("apply", f"--filename={path}")

    def delete(self, what: str) -> None:
        self.kubectl("delete", what, f"--namespace={NAMESPACE}", "--wait=true", "--ignore-not-found")

    def get_pod(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods/{name}")
        return found

    def pid_in(self, name: str) -> int:
        """A process of the pod."""
        uid = self.get_pod(name)["metadata"]["uid"]
        return until(f"a process of pod {name}", lambda: next(_processes_with(uid), None))

    def cgroup_of(self, name: str) -> Path:
        """The pod's cgroup, in which each container has one: looking there costs little while something is timed."""
        pid = self.pid_in(name)
        uid = self.get_pod(name)["metadata"]["uid"]
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if uid in path:
                return cgroups.ROOT / controllers.removeprefix("name=") / path.removeprefix("/").rpartition("/")[0]
        raise Failure(f"process {pid} is no more in a cgroup of pod {name}")


def measure_apply_and_delete(stage: Stage, number: int) -> None:
    """From apply to the first packet; then from delete to no packet socket in the pod's network namespace."""
    before, captures = set(_names(stage.captures)), stage.captures
    pid = stage.pid_in("talker")
    began = time.monotonic()
    applying = stage.apply(capture(f"apply-{number}", "talker"))

    def first_packet() -> bool:
        new = [captures / name for name in _names(captures) if name not in before]
        return any(_size(file) > _FILE_HEADER for directory in new for file in directory.glob("*.pcap"))

    until("the first packet", first_packet)
    stage.times[OURS].append(time.monotonic() - began)
    _finish(applying)
    began = time.monotonic()
    deleting = stage.kubectl.start(
        "delete", f"packetcapture/apply-{number}", f"--namespace={NAMESPACE}", "--wait=false"
    )
    until("the worker to be silent", lambda: not _packet_sockets(pid))
    stage.times[SILENT].append(time.monotonic() - began)
    _finish(deleting)


def measure_new_pod(stage: Stage, number: int) -> None:
    """From a pod's creation, and from its readiness, to its capture; a capture that waits for it is there already."""
    name, before, captures = f"late-{number}", set(_names(stage.captures)), stage.captures
    _finish(stage.apply(capture(name, name)))
    began = time.monotonic()
    creating = stage.apply(pod(name, "sleep", "infinity", labels={"app": name}, nodeName=NODE))
    moments: dict[str, float] = {}

    def both() -> bool:
        if "captured" not in moments and any(
            file.startswith(f"{name}_")
            for directory in _names(captures)
            if directory not in before
            for file in _names(captures / directory)
        ):
            moments["captured"] = time.monotonic()
        if "ready" not in moments and creating.poll() is not None and _is_ready(stage.get_pod(name)):
            moments["ready"] = time.monotonic()
        return len(moments) == 2

    until(f"pod {name} to be ready and captured", both)
    stage.times[CREATED].append(moments["captured"] - began)
    stage.times[READY].append(moments["captured"] - moments["ready"])
    _finish(creating)
    stage.delete(f"packetcapture/{name}")
    stage.delete(f"pod/{name}")


def measure_debug(stage: Stage, number: int) -> None:
    """From `kubectl debug` to the first packet in the file that tcpdump writes in the ephemeral container."""
    containers = stage.cgroup_of("talker")
    before = set(_names(containers))
    began = time.monotonic()
    debugging = stage.kubectl.start(
        "debug", "talker", f"--namespace={NAMESPACE}", f"--image={IMAGE}", f"--container=debug-{number}",
        "--image-pull-policy=IfNotPresent", "--profile=netadmin", "--",
        "tcpdump", "--immediate-mode", "-U", "-n", "-i", "eth0", "-Z", "root", "-w", _DEBUG_FILE, "icmp",
    )  # fmt: skip

    def started() -> int | None:
        new = [containers / name / "cgroup.procs" for name in _names(containers) if name not in before]
        return next((pid for group in new for pid in _pids(group) if _program(pid) == "tcpdump"), None)

    tcpdump = until("the debug container's tcpdump", started)
    file = Path(f"/proc/{tcpdump}/root{_DEBUG_FILE}")
    until("the debug container's first packet", lambda: _size(file) > _FILE_HEADER)
    stage.times[DEBUG].append(time.monotonic() - began)
    os.kill(tcpdump, signal.SIGKILL)  # an ephemeral container can't be removed, but ended
    _finish(debugging)


def measure_sniff(stage: Stage, number: int) -> None:
    """From the creation of a privileged pod on the node to the first packet that comes back through kubectl exec."""
    name, uid = f"sniff-{number}", stage.get_pod("talker")["metadata"]["uid"]
    manifest = pod(
        name,
        "sleep",
        "infinity",
        labels={},
        nodeName=NODE,
        hostPID=True,
        container={"securityContext": {"privileged": True}},
    )
    sniff = (
        f"for p in /proc/[0-9]*; do grep -qs 'pod{uid}' $p/cgroup && "
        "exec nsenter --net=$p/ns/net tcpdump -n -i eth0 -U -w - icmp; done"
    )
    began = time.monotonic()
    _finish(stage.apply(manifest))
    where = (f"--namespace={NAMESPACE}", f"pod/{name}")
    stage.kubectl("wait", *where, "--for=condition=Ready", "--timeout=60s")
    executing = stage.kubectl.start("exec", where[0], name, "--", "sh", "-c", sniff)
    assert executing.stdout is not None
    received = 0
    while received <= _FILE_HEADER:
        data = os.read(executing.stdout.fileno(), 1 << 16)
        if not data:
            raise Failure(f"no packet came through kubectl exec: {executing.communicate()[1].decode()}")
        received += len(data)
    stage.times[SNIFF].append(time.monotonic() - began)
    executing.kill()
    executing.communicate()
    stage.delete(f"pod/{name}")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure all of it in turn, so often. Raises Failure."""
    given = os.environ.get("KUBEPCAP_CLUSTER")
    name = given or "bench"
    outcome = Outcome("hack/bench start", Machine.describe(), f"{METHOD}\n{arguments.repeats} repeats.")
    was_up = lifecycle.running(name)
    cluster = lifecycle.up(name)
    try:
        install(cluster)
        with tempfile.TemporaryDirectory(prefix="kubepcap-bench-") as place, talking(cluster, Path(place)) as stage:
            for number in range(arguments.repeats):
                for measure in (measure_apply_and_delete, measure_debug, measure_new_pod, measure_sniff):
                    measure(stage, number)
                print(f"repeat {number + 1}: done", file=sys.stderr, flush=True)
    finally:
        if not was_up:
            lifecycle.down(name)
    spreads = {what: Spread.of(stage.times[what]) for what in (OURS, DEBUG, SNIFF, CREATED, READY, SILENT)}
    for what, spread in spreads.items():
        outcome.rows.append(
            {
                "what": what,
                "median s": round(spread.median, 3),
                "p90 s": round(spread.p90, 3),
                "lowest s": round(spread.lowest, 3),
                "highest s": round(spread.highest, 3),
                "ratio": spread.median / spreads[OURS].median if what in {OURS, DEBUG, SNIFF} else None,
            }
        )
    median = spreads[OURS].median
    outcome.goals.append(
        Goal(f"median from apply to first packet under {_GOAL_SECONDS} s", f"{median:.3f} s", median < _GOAL_SECONDS)
    )
    return outcome


@contextlib.contextmanager
def talking(cluster: Cluster, directory: Path) -> Iterator[Stage]:
    """A namespace with a pod that talks all the time, for as long as the block."""
    kubectl = Kubectl(cluster.kubeconfig)
    stage = Stage(cluster, kubectl, Api(cluster.kubeconfig), directory)
    kubectl("create", "namespace", NAMESPACE)
    try:
        service_account = ("get", "serviceaccount", "default", f"--namespace={NAMESPACE}")
        until("the ServiceAccount", lambda: kubectl(*service_account, check=False).returncode == 0)
        _finish(stage.apply(pod("listener", "sleep", "infinity", labels={}, nodeName="node-b")))
        kubectl("wait", f"--namespace={NAMESPACE}", "pod/listener", "--for=condition=Ready", "--timeout=60s")
        address = stage.get_pod("listener")["status"]["podIP"]
        talk = ("ping", "-q", "-i", "0.005", address)
        _finish(stage.apply(pod("talker", *talk, labels={"app": "talker"}, nodeName=NODE)))
        kubectl("wait", f"--namespace={NAMESPACE}", "pod/talker", "--for=condition=Ready", "--timeout=60s")
        yield stage
    finally:
        kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=10, help="of each way (default: 10)")


def _finish(process: Process) -> None:
    said, complaint = process.communicate()
    if process.returncode:
        raise Failure(f"kubectl failed: {(complaint or said).decode(errors='replace').strip()}")


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _is_ready(document: dict[str, Any]) -> bool:
    conditions = document["status"].get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _processes_with(uid: str) -> Iterator[int]:
    """Processes of the pod with this UID."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if uid in (entry / "cgroup").read_text():
                    yield int(entry.name)


def _pids(group: Path) -> list[int]:
    """The processes of a cgroup, by its cgroup.procs; none when it is gone."""
    try:
        return [int(pid) for pid in group.read_text().split()]
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return []


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _packet_sockets(pid: int) -> list[str]:
    """The packet sockets (packet(7)) in the network namespace of a process."""
    return Path(f"/proc/{pid}/net/packet").read_text().splitlines()[1:]
