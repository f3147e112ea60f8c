"""Policies as they are written, shipped and stored."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from api.capturepolicy import CapturePolicy, Limits
from api.packetcapture import PacketCaptureSpec
from api.verdict import Circumstances, refused

PROJECT = Path(__file__).parents[2]
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def shipped() -> CapturePolicy:
    return CapturePolicy.model_validate(yaml.safe_load((PROJECT / "manifests" / "baseline.yaml").read_text()))


def documented() -> CapturePolicy:
    """That of the README."""
    blocks: list[str] = re.findall(r"^```yaml\n(.*?)^```$", (PROJECT / "README.md").read_text(), re.M | re.S)
    (policy,) = (CapturePolicy.model_validate(yaml.safe_load(text)) for text in blocks if "kind: CapturePolicy" in text)
    return policy


def test_the_shipped_baseline_allows_the_shipped_example() -> None:
    example = yaml.safe_load((PROJECT / "manifests" / "examples" / "nginx-pcap.yaml").read_text())
    spec = PacketCaptureSpec.model_validate(example["spec"])
    assert refused(spec, shipped(), Circumstances(now=NOW)) is None


@pytest.mark.parametrize(
    ("selector", "ports", "allowed"),
    [
        ("app == 'x' && tier != 'vault'", [80], True),
        ("app in {'x', 'y'} && tier == 'web'", [80], True),
        ("app == 'x'", [80], False),
        ("has(app) && tier != 'vault'", [80], False),
        ("app == 'x' && tier != 'vault'", [22], False),
    ],
)
def test_the_policy_of_the_readme_does_what_it_says(selector: str, ports: list[int], *, allowed: bool) -> None:
    fields: dict[str, Any] = {
        "selector": selector,
        "filters": [{"protocol": "TCP", "ports": ports}],
        "endTime": "2030-01-01T00:30:00Z",
        "ttlSecondsAfterFinished": 3600,
    }
    here = Circumstances(now=NOW, namespace_labels={"team": "web"})
    assert (refused(PacketCaptureSpec.model_validate(fields), documented(), here) is None) is allowed


@pytest.mark.parametrize(
    "selectors",
    [
        {"requiredKeys": ["app "]},
        {"forbidden": [{"key": "a/b/c", "values": ["x"]}]},
        {"forbidden": [{"key": "tier", "values": ["vault "]}]},
    ],
)
def test_a_rule_on_what_can_be_no_label_is_no_rule_and_refused(selectors: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Invalid value"):
        CapturePolicy.model_validate({"metadata": {"name": "p"}, "spec": {"selectors": selectors}})


def test_a_policy_of_an_earlier_release_allows_what_it_did() -> None:
    older = CapturePolicy.model_validate({"metadata": {"name": "older"}, "spec": {"limits": {"maxDuration": "24h"}}})
    for fields in (
        {"selector": "has(app)"},
        {"selector": "app == 'x'", "startTime": "2030-01-05T00:00:00Z", "ttlSecondsAfterFinished": 10**9},
    ):
        assert refused(PacketCaptureSpec.model_validate(fields), older, Circumstances(now=NOW)) is None
    assert (older.spec.limits.max_captures_per_user, older.spec.limits.max_pods_per_node) == (None, None)


def test_limits_are_written_as_manifests_have_them_and_read_back() -> None:
    limits = Limits(max_ttl=timedelta(hours=1), require_end_time=True, max_captures_per_user=3, max_pods_per_node=2)
    written = limits.to_json()
    assert (written["maxTTL"], written["maxStartDelay"]) == ("1h0m0s", "168h0m0s")
    assert Limits.model_validate(written) == limits
    assert Limits.model_validate(written | {"maxOfALaterRelease": 1}) == limits


@pytest.mark.parametrize(
    "spec",
    [
        {"selectors": {"forbidden": [{"key": "tier", "values": []}]}},
        {"selectors": {"requiredKeys": [""]}},
        {"limits": {"maxCapturesPerUser": 0}},
        {"limits": {"maxPodsPerNode": 0}},
        {"limits": {"maxTTL": "soon"}},
        {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}},
    ],
)
def test_a_rule_that_says_nothing_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CapturePolicy.model_validate({"metadata": {"name": "p"}, "spec": spec})
