"""What the end-to-end tests do with captures: begin them, wait, list, download, and compare with tcpdump in the pod."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Self, TypeVar

from scapy.utils import RawPcapReader

from hack.clusters.failure import Failure
from hack.clusters.kubectl import Kubectl

API = "/apis/subresources.kubepcap.io/v1"
PATIENCE = 60.0

T = TypeVar("T")


def until(what: str, look: Callable[[], T | None], *, patience: float = PATIENCE) -> T:
    """What `look` finds, asked again until it is something true. Fails with the last it found."""
    deadline = time.monotonic() + patience
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {patience:.0f} s for {what}; last: {found!r}"
        time.sleep(0.1)


def manifest(name: str, namespace: str, **spec: Any) -> str:
    """A PacketCapture, ready for `kubectl apply -f -`."""
    return json.dumps(
        {
            "apiVersion": "kubepcap.io/v1",
            "kind": "PacketCapture",
            "metadata": {"name": name, "namespace": namespace},
            "spec": spec,
        }
    )


@dataclass(frozen=True)
class Capture:
    """A PacketCapture in the cluster."""

    kubectl: Kubectl
    namespace: str
    name: str

    @property
    def path(self) -> str:
        return f"{API}/namespaces/{self.namespace}/packetcaptures/{self.name}/files"

    def get(self) -> dict[str, Any]:
        capture: dict[str, Any] = self.kubectl.json("get", "packetcapture", self.name, f"--namespace={self.namespace}")
        return capture

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get().get("status", {})
        return status

    def condition(self, kind: str) -> dict[str, Any]:
        conditions: list[dict[str, Any]] = self.status().get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == kind), {})

    def wait_for_phase(self, *phases: str) -> dict[str, Any]:
        return until(
            f"{self.name} to be {' or '.join(phases)}",
            lambda: status if (status := self.status()).get("phase") in phases else None,
        )

    def wait_for_pods(self, count: int) -> None:
        until(f"{count} pods captured by {self.name}", lambda: self.status().get("pods", 0) == count)

    def files(self) -> list[dict[str, Any]]:
        listed = json.loads(self.kubectl.bytes("get", "--raw", self.path))
        assert not listed.get("unanswered"), listed
        items: list[dict[str, Any]] = listed["items"]
        return items

    def files_of(self, pod: str) -> list[dict[str, Any]]:
        return [file for file in self.files() if file["pod"] == pod]

    def download(self, file: dict[str, Any]) -> bytes:
        return self.kubectl.bytes("get", "--raw", file["url"])

    def delete(self) -> None:
        self.kubectl("delete", "packetcapture", self.name, f"--namespace={self.namespace}", "--ignore-not-found")


@contextmanager
def capturing(kubectl: Kubectl, name: str, namespace: str, **spec: Any) -> Iterator[Capture]:
    """A capture that is deleted afterwards."""
    kubectl("apply", "--filename=-", input=manifest(name, namespace, **spec))
    capture = Capture(kubectl, namespace, name)
    try:
        yield capture
    finally:
        capture.delete()


def packets(pcap: bytes) -> list[bytes]:
    """The packets in a pcap file, in order, as they were on the interface."""
    reader = RawPcapReader(BytesIO(pcap))  # type: ignore[arg-type]
    try:
        return [data for data, _ in reader]
    finally:
        reader.close()


class Tcpdump:
    """tcpdump in a pod's own namespace, for comparison."""

    def __init__(self, kubectl: Kubectl, pod: str, namespace: str, expression: str) -> None:
        self._kubectl = kubectl
        self._pod = pod
        self._namespace = f"--namespace={namespace}"
        command = f"echo $$ > /tmp/tcpdump.pid; exec tcpdump -i eth0 -s 0 -U --immediate-mode -w - '{expression}'"
        self._process = kubectl.start("exec", self._namespace, pod, "--", "sh", "-c", command)

    def __enter__(self) -> Self:
        assert self._process.stderr is not None
        while b"listening on" not in (line := self._process.stderr.readline()):
            assert line, "tcpdump did not start"
        return self

    def stop(self) -> bytes:
        """Its pcap file, once it has written all it saw."""
        self._kubectl("exec", self._namespace, self._pod, "--", "sh", "-c", "kill -INT $(cat /tmp/tcpdump.pid)")
        written, _ = self._process.communicate(timeout=30)
        return written

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def pods(kubectl: Kubectl, namespace: str, selector: str) -> dict[str, dict[str, Any]]:
    """Running pods by name."""
    listed = kubectl.json("get", "pods", f"--namespace={namespace}", f"--selector={selector}")
    return {pod["metadata"]["name"]: pod for pod in listed["items"] if "deletionTimestamp" not in pod["metadata"]}


def refused(kubectl: Kubectl, *arguments: str, user: str | None = None, given: str | None = None) -> str:
    """What kubectl says when it must be refused."""
    answer: subprocess.CompletedProcess[str] = kubectl(*arguments, user=user, input=given, check=False)
    if answer.returncode == 0:
        raise Failure(f"kubectl {' '.join(arguments)} was not refused")
    return answer.stderr.strip()
