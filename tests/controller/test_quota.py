"""Who is admitted: never more than the limit, those who are stay, the oldest come next."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.packetcapture import PacketCapture
from api.stamp import ANNOTATION
from controller.quota import Admission, admit
from tests.controller.cases import START, after, capture


def admitted(*captures: PacketCapture, already: tuple[str, ...] = (), now: datetime = START) -> list[str]:
    decided = admit(captures, already=already, now=now)
    return [one.metadata.name for one in captures if decided[one.metadata.uid].admitted]


def decision(*captures: PacketCapture, now: datetime = START) -> Admission:
    """That on the last of them."""
    return admit(captures, already=(), now=now)[captures[-1].metadata.uid]


def test_captures_are_admitted_up_to_the_limit_the_oldest_first() -> None:
    third, first, second = (
        capture(name, created=after(minutes=minute)) for name, minute in [("c", 3), ("a", 1), ("b", 2)]
    )
    assert admitted(third, first, second, now=after(minutes=4)) == ["a", "b"]


def test_who_waits_is_told_the_limit_and_what_for() -> None:
    waiting = decision(capture("a"), capture("b"), capture("c", created=after(seconds=1)))
    assert waiting.reason == "QuotaExceeded"
    assert waiting.message == (
        "policy baseline allows 2 active at once in namespace dev: "
        "it waits until one of them (a, b) ends, is suspended or is deleted"
    )


def test_a_long_list_of_others_is_cut() -> None:
    others = [capture(f"c{number}", limit=5) for number in range(5)]
    waiting = decision(*others, capture("z", limit=5, created=after(seconds=1)))
    assert "(c0, c1, c2, …)" in waiting.message


def test_who_is_admitted_stays_so_when_an_older_one_comes_back() -> None:
    old, new = capture("old", limit=1), capture("new", limit=1, created=after(minutes=1))
    assert admitted(old, new, already=("uid-new",), now=after(minutes=2)) == ["new"]


def test_policies_and_namespaces_are_counted_apart() -> None:
    captures = [
        capture("a", limit=1),
        capture("b", limit=1, policy="other"),
        capture("c", limit=1, namespace="prod"),
        capture("d", limit=1, created=after(seconds=1)),
    ]
    assert admitted(*captures) == ["a", "b", "c"]


def test_those_of_one_user_are_counted_in_all_namespaces_and_for_each_policy() -> None:
    captures = [
        capture("a", user_limit=2),
        capture("b", user_limit=2, namespace="prod"),
        capture("c", user_limit=2, user="bob"),
        capture("d", user_limit=2, policy="other"),
        capture("e", user_limit=2, namespace="test", created=after(seconds=1)),
    ]
    assert admitted(*captures) == ["a", "b", "c", "d"]


def test_who_waits_for_the_users_limit_is_told_nothing_of_other_namespaces() -> None:
    there = [capture("secret", user_limit=2, namespace="prod"), capture("hidden", user_limit=2, namespace="prod")]
    later = capture("later", user_limit=2, created=after(seconds=1))
    words = "policy baseline allows 2 active at once of user alice: it waits until one of them ({}) ends, "
    assert decision(*there, later).message == words.format("others elsewhere") + "is suspended or is deleted"
    mixed = [there[0], capture("mine", user_limit=2), later]
    assert decision(*mixed).message.startswith(words.format("mine, others elsewhere"))
    assert decision(*mixed).reason == "QuotaExceeded"


def test_without_a_limit_for_users_namespaces_alone_count() -> None:
    captures = [capture(name, namespace=name) for name in "abcdef"]
    assert admitted(*captures) == list("abcdef")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (capture("x", suspend=True), "Suspended"),
        (capture("x", endTime="2030-01-01T00:10:00Z"), "Ended"),
        (capture("x", created=after(hours=-1)), "Ended"),
        (capture("x", deleted=True), "Deleted"),
        (capture("x", policy=None), "NotStamped"),
    ],
    ids=["suspended", "past its end", "past the longest duration", "being deleted", "without a stamp"],
)
def test_what_does_not_run_takes_no_place(other: PacketCapture, reason: str) -> None:
    now = after(minutes=10)
    decided = admit([other, capture("new", limit=1)], already=["uid-x"], now=now)
    assert (decided["uid-x"].admitted, decided["uid-x"].reason) == (False, reason)
    assert decided["uid-new"].admitted


def test_one_that_is_to_start_later_takes_a_place() -> None:
    later = capture("later", limit=1, startTime="2030-01-02T00:00:00Z")
    assert admitted(later, capture("now", limit=1, created=after(seconds=1))) == ["later"]


def test_a_stamp_that_does_not_fit_says_why() -> None:
    good = capture("web")
    foreign = good.model_copy(update={"spec": good.spec.model_copy(update={"snap_length": 100})})
    assert decision(foreign).reason == "StampOutdated"
    assert not decision(foreign).is_obeyable
    unreadable = good.metadata.model_copy(update={"annotations": {ANNOTATION: "{"}})
    assert decision(good.model_copy(update={"metadata": unreadable})).reason == "StampUnreadable"


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["p", "q"]), st.sampled_from(["dev", "prod"]), st.sampled_from("ab")
        ),
        max_size=12,
    ),
    st.sets(st.integers(0, 11)),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_no_limit_is_ever_passed_and_who_waits_waits_for_one(
    made: list[tuple[int, str, str, str]], already: set[int], limit: int, user_limit: int
) -> None:
    captures = [
        capture(
            f"c{number}",
            created=after(seconds=second),
            policy=policy,
            namespace=namespace,
            user=user,
            limit=limit,
            user_limit=user_limit,
        )
        for number, (second, policy, namespace, user) in enumerate(made)
    ]
    decided = admit(captures, already=[f"uid-c{number}" for number in already], now=after(seconds=5))
    running = [facts for number, (_, *facts) in enumerate(made) if decided[f"uid-c{number}"].admitted]
    for number, (_, policy, namespace, user) in enumerate(made):
        in_namespace = sum(facts[:2] == [policy, namespace] for facts in running)
        of_user = sum([facts[0], facts[2]] == [policy, user] for facts in running)
        assert in_namespace <= limit
        assert of_user <= user_limit
        if not decided[f"uid-c{number}"].admitted:
            assert in_namespace == limit or of_user == user_limit
    again = admit(captures, already=[uid for uid, one in decided.items() if one.admitted], now=after(seconds=6))
    assert again == decided


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["p", "q"]), st.booleans()), max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(1, 4),
)
def test_the_limit_is_never_passed_and_never_left_unused(
    made: list[tuple[int, str, bool]], already: set[int], limit: int
) -> None:
    captures = [
        capture(f"c{number}", created=after(seconds=second), policy=policy, suspend=suspended, limit=limit)
        for number, (second, policy, suspended) in enumerate(made)
    ]
    decided = admit(captures, already=[f"uid-c{number}" for number in already], now=after(seconds=5))
    for policy in ("p", "q"):
        active = [f"uid-c{number}" for number, (_, of, suspended) in enumerate(made) if of == policy and not suspended]
        assert sum(decided[uid].admitted for uid in active) == min(limit, len(active))
    again = admit(captures, already=[uid for uid, one in decided.items() if one.admitted], now=after(seconds=6))
    assert again == decided
