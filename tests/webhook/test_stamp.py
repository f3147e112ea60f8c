"""What stamp a capture gets: never the user's own, and only what a policy allows."""

from datetime import UTC, datetime
from typing import Any

import pytest

from api.packetcapture import PacketCaptureSpec
from api.stamp import ANNOTATION, check
from api.verdict import Circumstances
from tests.webhook.cases import ALICE, annotation, capture, create, earlier_annotation, patched, policy, stamped, update
from webhook.stamp import annotation_of, capture_of, deserved, kept, only_ends, put

NOW = Circumstances(now=datetime(2030, 1, 1, tzinfo=UTC))
BASELINE = policy("baseline")
NO_SSH = policy("a-no-ssh", filters={"deniedPorts": [22]})


def test_an_allowed_capture_gets_a_stamp_that_fits() -> None:
    request = create(capture())
    given = put(request, deserved(request, [BASELINE], NOW))
    result = patched(capture(), given.patch)
    stamp = check(capture_of(create(result)))
    assert (stamp.user, stamp.policy, stamp.namespace) == ("alice", "baseline", "dev")
    assert stamp.limits == BASELINE.spec.limits


def test_the_first_policy_by_name_that_allows_it_is_named() -> None:
    allowed = create(capture(filters=[{"protocol": "TCP", "ports": [80]}]))
    denied = create(capture(filters=[{"protocol": "TCP", "ports": [22]}]))
    assert '"policy":"a-no-ssh"' in (deserved(allowed, [BASELINE, NO_SSH], NOW) or "")
    assert '"policy":"baseline"' in (deserved(denied, [BASELINE, NO_SSH], NOW) or "")


@pytest.mark.parametrize(
    ("spec", "usable"),
    [
        ({}, []),
        ({"selector": "all()"}, [BASELINE]),
        ({"selector": "app =="}, [BASELINE]),
        ({"filters": [{"ports": [70000]}]}, [BASELINE]),
        ({"podSelector": {}}, [BASELINE]),
    ],
    ids=["no policy", "refused by the policy", "bad selector", "bad port", "two selectors"],
)
def test_what_is_not_allowed_gets_none_and_is_not_denied_here(spec: dict[str, Any], usable: list[Any]) -> None:
    request = create(capture(stamp="mine", **spec))
    given = put(request, deserved(request, usable, NOW))
    assert given.refusal is None
    assert annotation_of(patched(request.object or {}, given.patch)) is None


def test_a_stamp_that_the_user_sent_is_replaced() -> None:
    forged = annotation(capture(), user="someone-else", by=BASELINE)
    request = create(capture(stamp=forged))
    given = put(request, deserved(request, [BASELINE], NOW))
    assert annotation_of(patched(request.object or {}, given.patch)) == annotation(capture(), by=BASELINE)


def test_other_annotations_stay() -> None:
    item = capture()
    item["metadata"]["annotations"] = {"a/b": "c"}
    request = create(item)
    result = patched(item, put(request, deserved(request, [BASELINE], NOW)).patch)
    assert result["metadata"]["annotations"].keys() == {"a/b", ANNOTATION}


def test_nothing_is_patched_when_the_stamp_is_right() -> None:
    request = create(stamped(by=BASELINE))
    assert put(request, deserved(request, [BASELINE], NOW)).patch == ()


def test_an_update_that_leaves_the_spec_alone_keeps_the_stamp() -> None:
    old = stamped(user="bob", by=BASELINE)
    for new in (capture(), capture(stamp="mine"), old):
        request = update(old, new)
        expected = kept(request)
        assert expected is not None
        assert annotation_of(patched(new, put(request, expected.annotation).patch)) == annotation_of(old)


def test_an_update_can_not_bring_a_stamp_to_a_capture_that_has_none() -> None:
    request = update(capture(), stamped(by=BASELINE))
    expected = kept(request)
    assert expected is not None
    assert annotation_of(patched(request.object or {}, put(request, expected.annotation).patch)) is None


def test_the_same_spec_in_other_words_is_not_judged_again() -> None:
    old = stamped(by=BASELINE, rotation={"maxFileSize": "10M"})
    new = stamped(by=BASELINE, rotation={"maxFileSize": 10_000_000})
    assert kept(update(old, new)) is not None


def test_metadata_of_a_capture_that_can_not_be_read_may_change() -> None:
    item = capture(selector="app ==")
    expected = kept(update(item, item))
    assert expected is not None
    assert expected.annotation is None


def test_ending_a_capture_keeps_who_was_judged() -> None:
    old = stamped(user="bob", by=BASELINE)
    new = capture(stamp=annotation_of(old), suspend=True)
    expected = kept(update(old, new, user=ALICE))
    assert expected is not None
    assert expected.annotation == annotation(new, user="bob", by=BASELINE)


def test_a_stamp_with_the_defaults_is_the_text_that_releases_without_the_later_limits_want_to_find() -> None:
    assert deserved(create(capture()), [BASELINE], NOW) == earlier_annotation(capture())
    old = capture(stamp=earlier_annotation(capture()))
    expected = kept(update(old, capture(suspend=True)))
    assert expected is not None
    assert expected.annotation == earlier_annotation(capture(suspend=True))


def test_ending_a_capture_keeps_limits_that_only_a_newer_release_knows() -> None:
    newer = annotation(capture(), by=BASELINE).replace('"limits":{', '"limits":{"maxUnheardOf":1,')
    expected = kept(update(capture(stamp=newer), capture(suspend=True)))
    assert expected is not None
    assert '"maxUnheardOf":1' in (expected.annotation or "")
    assert check(capture_of(create(capture(stamp=expected.annotation, suspend=True)))).policy == "baseline"


def test_ending_a_capture_does_not_make_an_outdated_stamp_fit() -> None:
    outdated = annotation(capture(selector="all()"), by=BASELINE)
    expected = kept(update(capture(stamp=outdated), capture(suspend=True)))
    assert expected is not None
    assert expected.annotation == outdated


@pytest.mark.parametrize(
    ("old", "new", "free"),
    [
        ({}, {"suspend": True}, True),
        ({"suspend": True}, {}, False),
        ({"suspend": True}, {"suspend": True, "endTime": "2030-01-01T00:00:00Z"}, True),
        ({}, {"endTime": "2030-01-01T00:00:00Z"}, True),
        ({"endTime": "2030-01-02T00:00:00Z"}, {"endTime": "2030-01-01T00:00:00Z"}, True),
        ({"endTime": "2030-01-01T00:00:00Z"}, {"endTime": "2030-01-02T00:00:00Z"}, False),
        ({"endTime": "2030-01-01T00:00:00Z"}, {}, False),
        ({"endTime": "2030-01-01T00:00:00Z"}, {"suspend": True}, False),
        ({"suspend": True, "endTime": "2030-01-02T00:00:00Z"}, {"endTime": "2030-01-01T00:00:00Z"}, False),
        ({}, {"suspend": True, "selector": "all()"}, False),
        ({}, {"endTime": "2030-01-01T00:00:00Z", "snapLength": 128}, False),
        ({}, {"startTime": "2030-01-01T00:00:00Z"}, False),
        ({}, {"ttlSecondsAfterFinished": 1}, False),
    ],
)
def test_only_an_earlier_end_and_suspending_are_free(old: dict[str, Any], new: dict[str, Any], *, free: bool) -> None:
    def spec(changes: dict[str, Any]) -> PacketCaptureSpec:
        return PacketCaptureSpec.model_validate({"selector": 'app == "web"'} | changes)

    assert only_ends(spec(old), spec(new)) is free
