"""The admission stamp: what it is bound to."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api import stamp
from api.capturepolicy import Limits
from api.packetcapture import PacketCapture

CREATED = datetime(2026, 12, 1, 10, tzinfo=UTC)


def capture(
    spec: dict[str, Any], *, namespace: str = "dev", annotations: dict[str, str] | None = None
) -> PacketCapture:
    return PacketCapture.model_validate(
        {
            "metadata": {
                "name": "c",
                "namespace": namespace,
                "creationTimestamp": "2026-12-01T10:00:00Z",
                "annotations": annotations or {},
            },
            "spec": spec,
        }
    )


SPEC = {"selector": "app == 'x'"}


def stamped(spec: dict[str, Any]) -> dict[str, str]:
    given = stamp.Stamp(
        user="u",
        policy="baseline",
        limits=Limits(max_duration=timedelta(hours=1)),
        namespace="dev",
        spec_hash=stamp.spec_hash(capture(spec).spec),
    )
    return {stamp.ANNOTATION: given.to_annotation()}


def test_a_stamp_fits_the_spec_it_was_given_for() -> None:
    assert stamp.check(capture(SPEC, annotations=stamped(SPEC))).policy == "baseline"


def test_defaults_that_kube_apiserver_fills_in_do_not_change_the_hash() -> None:
    filled = SPEC | {"suspend": False, "snapLength": 262144, "rotation": {"maxFiles": 2, "maxFileSize": "10M"}}
    assert stamp.check(capture(filled, annotations=stamped(SPEC))).user == "u"


def test_a_stamp_of_an_older_release_still_fits_and_its_missing_limits_have_their_defaults() -> None:
    annotation = json.loads(stamped(SPEC)[stamp.ANNOTATION])
    older = {"maxDuration", "maxFileSize", "maxFiles", "maxSnapLength", "maxCapturesPerNamespace"}
    annotation["limits"] = {name: value for name, value in annotation["limits"].items() if name in older}
    checked = stamp.check(capture(SPEC, annotations={stamp.ANNOTATION: json.dumps(annotation)}))
    assert checked.limits.ring_size == Limits().ring_size
    assert checked.limits.max_bytes_per_node == Limits().max_bytes_per_node


def test_only_limits_that_came_later_and_have_their_defaults_are_left_out() -> None:
    first = json.loads(stamped(SPEC)[stamp.ANNOTATION])["limits"]
    assert "maxStartDelay" not in first
    assert first["maxDuration"] == "1h0m0s"
    limits = Limits(max_start_delay=timedelta(hours=1), require_end_time=True, max_pods_per_node=5)
    given = stamp.check(capture(SPEC, annotations=stamped(SPEC))).model_copy(update={"limits": limits})
    assert stamp.read({stamp.ANNOTATION: given.to_annotation()}) == given


def test_annotations_are_the_same_by_what_they_say_and_unknown_things_by_their_text() -> None:
    text = stamped(SPEC)[stamp.ANNOTATION]
    unknown = text.replace('"limits":{', '"limits":{"maxUnheardOf":1,')
    assert stamp.same(text, json.dumps(json.loads(text), indent=1))
    assert stamp.same(unknown, unknown)
    assert stamp.same(None, None)
    for other in (unknown, text.replace('"u"', '"v"'), "{}", "{", None):
        assert not stamp.same(text, other)
        assert not stamp.same(other, text)


def test_a_stamp_is_bound_to_the_interfaces() -> None:
    with pytest.raises(stamp.StampError):
        stamp.check(capture(SPEC | {"interfaces": ["lo"]}, annotations=stamped(SPEC)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (capture(SPEC), "NotStamped"),
        (capture({"selector": "app == 'y'"}, annotations=stamped(SPEC)), "StampOutdated"),
        (capture(SPEC | {"suspend": True}, annotations=stamped(SPEC)), "StampOutdated"),
        (capture(SPEC, namespace="other", annotations=stamped(SPEC)), "StampForeign"),
        (capture(SPEC, annotations={stamp.ANNOTATION: "{"}), "StampUnreadable"),
        (capture(SPEC, annotations={stamp.ANNOTATION: "{}"}), "StampUnreadable"),
    ],
)
def test_a_stamp_that_does_not_fit_is_refused(changed: PacketCapture, reason: str) -> None:
    with pytest.raises(stamp.StampError) as refusal:
        stamp.check(changed)
    assert refusal.value.reason == reason
    assert "delete it and create it again" in str(refusal.value)


@pytest.mark.parametrize(
    ("times", "ends"),
    [
        ({}, CREATED + timedelta(hours=1)),
        ({"endTime": "2026-12-01T10:15:00Z"}, CREATED + timedelta(minutes=15)),
        ({"endTime": "2026-12-01T12:00:00Z"}, CREATED + timedelta(hours=1)),
        ({"startTime": "2026-12-01T11:00:00Z"}, CREATED + timedelta(hours=2)),
    ],
)
def test_a_capture_ends_at_its_end_time_and_at_the_latest_after_the_longest_duration(
    times: dict[str, str], ends: datetime
) -> None:
    spec = SPEC | times
    judged = capture(spec, annotations=stamped(spec))
    assert stamp.check(judged).ends(judged) == ends
