"""What the agent shows to Prometheus.

No label names a capture, a pod or a namespace: their number has no bound, and one tenant's are none of another's.
"""

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from agent.capturer.protocol import State, TargetStatus
from agent.tally import Count
from api.capturenode import Capturer, Disk, NodeCapture
from api.packetcapture import PHASES

_PREFIX: Final = "kubepcap_agent"


class Metrics:
    """Counters since the agent began, and gauges as of the last report."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._captures = Gauge(
            f"{_PREFIX}_captures",
            "Captures that concern this node, by their state on it.",
            ["state"],
            registry=self._registry,
        )
        self._targets = self._gauge("targets", "Pods times captures that are captured or shall be.")
        self._connected = self._gauge("capturer_connected", "1 while the capturer can be reached.")
        self._interfaces = self._gauge("interfaces", "Interfaces that are captured.")
        self._ring_bytes = self._gauge("ring_bytes", "Kernel memory of the interfaces' rings.")
        self._files = self._gauge("files", "Capture files on the node.")
        self._disk_capacity = self._gauge("disk_capacity_bytes", "Size of the file system with the capture files.")
        self._disk_free = self._gauge("disk_free_bytes", "Free bytes of the file system with the capture files.")
        self._disk_used = self._gauge("disk_used_bytes", "Bytes that capture files take of their file system.")
        self._packets = self._counter("packets", "Packets written.")
        self._dropped = self._counter("dropped_packets", "Packets that passed a filter and were lost.")
        self._seen = self._counter("seen_packets", "Packets that captured interfaces counted, filtered or not.")
        self._written = self._counter("written_bytes", "Bytes written to capture files.")
        self.evicted = self._counter("evicted_files", "Files removed to keep the disk's limits.")
        self.recovered = self._counter("recovered_files", "Files finished by the agent since their writer died.")
        self.torn = self._counter("torn_bytes", "Bytes of half packets cut off files that the agent finished.")
        self._restarts = self._counter("capturer_restarts", "Times that the capturer died.")
        self._restarts_counted = 0
        self.interruptions = self._counter("interruptions", "Interruptions of captures, whatever caused them.")
        self.storage_errors = self._counter("storage_errors", "Times that a file or directory could not be dealt with.")
        self._failures = Counter(
            f"{_PREFIX}_failures",
            "Runs of a capture on a pod that failed, by reason.",
            ["reason"],
            registry=self._registry,
        )
        self.report_writes = self._counter("report_writes", "Writes of the CaptureNode.")
        self.report_errors = self._counter("report_errors", "Writes of the CaptureNode that failed.")
        self.heartbeat = self._gauge("heartbeat_timestamp_seconds", "When the CaptureNode was last written.")

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def count(self, rise: Count) -> None:
        """Packets and bytes came in."""
        self._packets.inc(rise.packets)
        self._dropped.inc(rise.dropped)
        self._seen.inc(rise.seen)
        self._written.inc(rise.size)

    def ended(self, status: TargetStatus) -> None:
        """A run is over."""
        if status.state is State.FAILED:
            self._failures.labels(status.reason).inc()

    def report(
        self, captures: Sequence[NodeCapture], *, targets: int, capturer: Capturer | None, disk: Disk | None, files: int
    ) -> None:
        """What the CaptureNode says."""
        states = [capture.state for capture in captures]
        for state in PHASES:
            self._captures.labels(state).set(states.count(state))
        self._targets.set(targets)
        self._files.set(files)
        self._connected.set(capturer is not None)
        if capturer is not None:
            self._restarts.inc(capturer.restarts - self._restarts_counted)
            self._restarts_counted = capturer.restarts
        self._interfaces.set(capturer.interfaces if capturer else 0)
        self._ring_bytes.set(capturer.ring_bytes if capturer else 0)
        if disk is not None:
            self._disk_capacity.set(disk.capacity)
            self._disk_free.set(disk.free)
            self._disk_used.set(disk.used)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", meaning, registry=self._registry)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", meaning, registry=self._registry)
