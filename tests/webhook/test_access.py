"""Whether a user may use a policy is kube-apiserver's word, asked once for a burst and never guessed."""

import asyncio
from typing import Any, cast

import pytest

from kube.client import Client
from kube.status import StatusError
from tests.webhook.cases import ALICE, policy
from webhook.access import Access
from webhook.review import User


class Reviewer:
    """Stands in for the connection to kube-apiserver."""

    def __init__(self, status: Any) -> None:
        self.status = status
        self.asked: list[dict[str, Any]] = []

    async def create(self, _: Any, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body["spec"])
        await asyncio.sleep(0)
        if isinstance(self.status, Exception):
            raise self.status
        return {"status": self.status}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_everything_that_is_known_of_the_user_is_asked_with() -> None:
    reviewer = Reviewer({"allowed": True})
    user = User(username="alice", uid="u", groups=("a", "b"), extra={"scopes": ("x", "y")})
    usable = await Access(cast("Client", reviewer)).usable([policy("baseline")], user=user, namespace="dev")
    assert [item.metadata.name for item in usable] == ["baseline"]
    assert reviewer.asked == [
        {
            "user": "alice",
            "uid": "u",
            "groups": ["a", "b"],
            "extra": {"scopes": ["x", "y"]},
            "resourceAttributes": {
                "verb": "use",
                "group": "kubepcap.io",
                "resource": "capturepolicies",
                "name": "baseline",
                "namespace": "dev",
            },
        }
    ]


async def test_a_burst_is_one_question() -> None:
    reviewer = Reviewer({"allowed": True})
    access = Access(cast("Client", reviewer))
    await asyncio.gather(*(access.usable([policy("p")], user=ALICE, namespace="dev") for _ in range(50)))
    assert len(reviewer.asked) == 1
    await access.usable([policy("p")], user=ALICE, namespace="prod")
    assert len(reviewer.asked) == 2


@pytest.mark.parametrize(("allowed", "kept_for"), [(True, 10.0), (False, 2.0)])
async def test_a_yes_is_kept_ten_seconds_and_a_no_two(*, allowed: bool, kept_for: float) -> None:
    clock, reviewer = Clock(), Reviewer({"allowed": allowed})
    access = Access(cast("Client", reviewer), clock=clock)
    for moment, questions in ((0.0, 1), (kept_for - 0.1, 1), (kept_for, 2)):
        clock.now = moment
        assert bool(await access.usable([policy("p")], user=ALICE, namespace="dev")) is allowed
        assert len(reviewer.asked) == questions


async def test_allowed_together_with_denied_is_a_denial() -> None:
    reviewer = Reviewer({"allowed": True, "denied": True})
    assert await Access(cast("Client", reviewer)).usable([policy("p")], user=ALICE, namespace="dev") == []


@pytest.mark.parametrize("status", [None, {}, {"allowed": "yes"}, StatusError(503, "away"), StatusError(403, "no")])
async def test_what_can_not_be_told_is_an_error_and_not_kept(status: Any) -> None:
    reviewer = Reviewer(status)
    access = Access(cast("Client", reviewer))
    for _ in range(2):
        with pytest.raises(StatusError) as failure:
            await access.usable([policy("p")], user=ALICE, namespace="dev")
        assert failure.value.code == 500
    assert len(reviewer.asked) == 2
