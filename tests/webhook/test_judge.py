"""Verdicts: what is refused, in which words, and that only our own stamp passes."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from api.stamp import ANNOTATION
from api.verdict import Circumstances
from tests.webhook.cases import ALICE, annotation, capture, create, earlier_annotation, policy, stamped, update
from webhook.judge import Policies, judge, judge_kept
from webhook.review import Answer, User
from webhook.stamp import kept

NOW = Circumstances(now=datetime(2030, 1, 1, tzinfo=UTC))
BASELINE = policy("baseline", limits={"maxDuration": "24h"})
LATER = Circumstances(now=datetime(2030, 1, 2, tzinfo=UTC), created=NOW.now)
NO_SSH = policy("web", filters={"deniedPorts": [22]})


def verdict(item: dict[str, Any], *usable: Any, existing: tuple[str, ...] = ("baseline",), **more: Any) -> Answer:
    return judge(create(item), Policies(usable=usable, existing=existing, **more), NOW)


def words(answer: Answer) -> tuple[int, str]:
    assert answer.refusal is not None
    return answer.refusal.code, answer.refusal.message


def test_what_is_stamped_as_we_would_is_allowed() -> None:
    answer = verdict(stamped(by=BASELINE, endTime="2030-01-01T01:00:00Z"), BASELINE)
    assert answer.refusal is None
    assert answer.audit == {"policy": "baseline", "rule": "allowed"}
    assert answer.warnings == []


def test_a_capture_without_an_end_is_warned_when_it_will_end() -> None:
    assert verdict(stamped(by=BASELINE), BASELINE).warnings == [
        "no endTime: capturing ends at 2030-01-02T00:00:00Z, after 24h0m0s (policy baseline)"
    ]
    later = stamped(by=BASELINE, startTime="2030-01-05T00:00:00Z")
    assert "2030-01-06T00:00:00Z" in verdict(later, BASELINE).warnings[0]


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ({"selector": "app =="}, 422, "spec: selector: "),
        ({"filters": [{"protocol": "TCP", "ports": [70000]}]}, 422, "spec.filters[0].ports[0]: 70000 is no port"),
        ({"podSelector": {}}, 422, "spec: give exactly one of selector and podSelector"),
        (
            {"startTime": "2030-01-02T00:00:00Z", "endTime": "2030-01-01T00:00:00Z"},
            422,
            "spec: endTime must be after startTime",
        ),
        ({"selector": "all()"}, 403, "policy baseline: the selector takes pods without any label too"),
        ({"filters": [{"ports": [22]}]}, 403, "policy web: port 22 is denied"),
    ],
)
def test_a_refusal_says_what_to_change(spec: dict[str, Any], code: int, message: str) -> None:
    usable = [NO_SSH] if "web" in message else [BASELINE]
    given, said = words(verdict(capture(**spec), *usable))
    assert given == code
    assert said.startswith(message)


def test_a_user_without_a_policy_is_told_which_exist() -> None:
    code, said = words(verdict(capture()))
    assert code == 403
    assert said.startswith("user alice may use no CapturePolicy in namespace dev (there are: baseline)")


def test_policies_that_can_not_be_read_are_named() -> None:
    _, said = words(verdict(capture(), unreadable=["broken"]))
    assert said.endswith("not considered, since they can't be read: broken")


def test_an_allowed_capture_without_a_stamp_is_refused() -> None:
    code, said = words(verdict(capture(), BASELINE))
    assert code == 500
    assert "did not stamp it" in said


@pytest.mark.parametrize(
    "stamp",
    [
        "",
        "{}",
        annotation(capture(), user="bob", by=BASELINE),
        annotation(capture(selector="all()"), by=BASELINE),
        annotation(capture(), by=policy("baseline", limits={"maxDuration": "999h"})),
        annotation(capture(), by=policy("other")),
        annotation(capture(), by=BASELINE).replace('"dev"', '"prod"'),
        annotation(capture(), by=policy("baseline", limits={"maxDuration": "24h", "maxPodsPerNode": 5})),
        annotation(capture(), by=BASELINE).replace('"limits":{', '"limits":{"unheardOf":1,'),
        annotation(capture(), by=BASELINE).replace('"user"', '"unheardOf":1,"user"'),
    ],
    ids=["empty", "no stamp", "user", "spec", "limits", "policy", "namespace", "later", "unknown limit", "unknown"],
)
def test_a_stamp_that_does_not_say_exactly_what_ours_does_is_refused(stamp: str) -> None:
    code, said = words(verdict(capture(stamp=stamp), BASELINE))
    assert code == 403
    assert ANNOTATION in said


def test_a_stamp_by_a_usable_policy_that_refuses_it_is_refused() -> None:
    ssh: dict[str, Any] = {"filters": [{"protocol": "TCP", "ports": [22]}]}
    item = capture(stamp=annotation(capture(**ssh), by=NO_SSH), **ssh)
    assert words(verdict(item, BASELINE, NO_SSH))[0] == 403


def test_any_usable_policy_that_allows_it_may_be_the_stamps() -> None:
    assert verdict(stamped(by=NO_SSH, filters=[{"ports": [80]}]), BASELINE, NO_SSH).audit["policy"] == "web"


def test_a_stamp_of_a_release_without_the_later_limits_is_ours_if_they_have_their_defaults() -> None:
    item = capture(stamp=earlier_annotation(capture()))
    assert verdict(item, policy("baseline")).audit["rule"] == "allowed"
    assert verdict(item, policy("baseline", limits={"maxPodsPerNode": 5})).audit["rule"] == "foreign-stamp"
    assert verdict(item, policy("baseline", limits={"maxStartDelay": "1h"})).audit["rule"] == "foreign-stamp"


def test_a_stamp_of_a_release_that_writes_out_every_limit_is_ours() -> None:
    by = policy("baseline")
    written = json.loads(annotation(capture(), by=by))
    written["limits"] = by.spec.limits.to_json()
    stamp = json.dumps(written, indent=1)
    assert stamp != annotation(capture(), by=by)
    assert verdict(capture(stamp=stamp), by).audit["rule"] == "allowed"


def test_a_capture_that_another_release_stamped_may_be_ended() -> None:
    old = capture(stamp=earlier_annotation(capture()))
    rewritten = earlier_annotation(capture(suspend=True))
    later = json.loads(rewritten)
    later["limits"] |= {"maxStartDelay": "168h0m0s", "requireEndTime": False}
    for stamp, allowed in (
        (rewritten, True),
        (json.dumps(later), True),
        (earlier_annotation(capture()), False),
        (rewritten.replace("alice", "bob"), False),
    ):
        request = update(old, capture(stamp=stamp, suspend=True))
        expected = kept(request)
        assert expected is not None
        assert (judge_kept(request, expected).refusal is None) is allowed


def test_an_update_is_judged_by_the_rights_of_who_updates() -> None:
    old = stamped(user="bob", by=BASELINE)
    new = stamped(user="bob", by=BASELINE, selector='app == "db"')
    request = update(old, new, user=User(username="mallory"))
    assert kept(request) is None
    assert words(judge(request, Policies(usable=[], existing=["baseline"]), NOW))[0] == 403


def test_a_free_update_passes_with_the_stamp_it_had_and_no_other() -> None:
    old = stamped(user="bob", by=BASELINE)
    forged = capture(stamp=annotation(capture(), user="alice", by=policy("other")))
    for new, allowed in ((old, True), (forged, False), (capture(), False)):
        request = update(old, new, user=ALICE)
        expected = kept(request)
        assert expected is not None
        assert (judge_kept(request, expected).refusal is None) is allowed


def test_a_warning_is_given_once_at_creation() -> None:
    request = update(stamped(by=BASELINE, suspend=True), stamped(by=BASELINE))
    answer = judge(request, Policies(usable=[BASELINE], existing=["baseline"]), LATER)
    assert answer.refusal is None
    assert answer.warnings == []
