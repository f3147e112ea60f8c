"""What Prometheus reads, by its own parser."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.capturer.protocol import State
from agent.metrics import Metrics
from agent.tally import Count
from api.capturenode import Capturer, Disk, NodeCapture
from tests.agent.test_tally import told


def values(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        sample.name.removeprefix("kubepcap_agent_") + "".join(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def capture(state: str, uid: str) -> NodeCapture:
    return NodeCapture.model_validate({"namespace": "dev", "name": "secret", "uid": uid, "state": state})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_counters_add_up(metrics: Metrics) -> None:
    metrics.count(Count(5, 1, 50, 524))
    metrics.count(Count(2, 0, 20, 200))
    shown = values(metrics)
    assert [shown[f"{name}_total"] for name in ("packets", "dropped_packets", "seen_packets", "written_bytes")] == [
        7,
        1,
        70,
        724,
    ]


def test_the_report_is_shown(metrics: Metrics) -> None:
    captures = [capture("Capturing", "u"), capture("Capturing", "v"), capture("Error", "w")]
    disk = Disk(capacity=100, free=60, used=20)
    for restarts in (1, 3):
        capturer = Capturer(restarts=restarts, interfaces=4, ring_bytes=1 << 24)
        metrics.report(captures, targets=5, capturer=capturer, disk=disk, files=9)
    shown = values(metrics)
    assert (shown["capturesCapturing"], shown["capturesError"], shown["capturesFinished"]) == (2, 1, 0)
    assert (shown["targets"], shown["interfaces"], shown["ring_bytes"], shown["files"]) == (5, 4, 1 << 24, 9)
    assert (shown["disk_capacity_bytes"], shown["disk_free_bytes"], shown["disk_used_bytes"]) == (100, 60, 20)
    assert (shown["capturer_restarts_total"], shown["capturer_connected"]) == (3, 1)
    metrics.report([], targets=0, capturer=None, disk=None, files=0)
    shown = values(metrics)
    assert (shown["capturesCapturing"], shown["capturer_connected"], shown["capturer_restarts_total"]) == (0, 0, 3)


def test_runs_that_failed_are_counted_by_reason(metrics: Metrics) -> None:
    metrics.ended(told(1, state=State.STOPPED))
    for _ in range(2):
        metrics.ended(replace(told(1, state=State.FAILED), reason="WriteFailed"))
    assert {name: value for name, value in values(metrics).items() if name.startswith("failures_total")} == {
        "failures_totalWriteFailed": 2
    }


def test_no_name_of_a_capture_is_shown(metrics: Metrics) -> None:
    metrics.report([capture("Capturing", "u")], targets=1, capturer=None, disk=None, files=1)
    assert b"secret" not in metrics.exposition()
    assert b"dev" not in metrics.exposition()
