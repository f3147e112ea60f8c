"""Admission as a whole: what it knows of namespaces, and what it says when it does not know."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from kube.client import CAPTUREPOLICIES, NAMESPACES, PODS
from tests.webhook.cases import capture, create, patched, update
from tests.webhook.standin import KubeApiserver
from webhook.admission import Admission
from webhook.review import Answer
from webhook.stamp import annotation_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)
WEB_TEAM = {"namespaceSelector": {"matchLabels": {"team": "web"}}}


@asynccontextmanager
async def admission(api: KubeApiserver) -> AsyncIterator[Admission]:
    """Admission that has read all policies and namespaces."""
    made = Admission(api.client, clock=lambda: NOW)
    following = [asyncio.create_task(made.policies.run()), asyncio.create_task(made.namespaces.run())]
    try:
        async with asyncio.timeout(10):
            await made.policies.synced()
            await made.namespaces.synced()
        yield made
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def judged(api: KubeApiserver, item: dict[str, Any] | None = None) -> Answer:
    """The verdict on a creation, stamped before."""
    item = item or capture()
    async with admission(api) as made:
        stamped = patched(item, (await made.stamp(create(item))).patch)
        return await made.judge(create(stamped))


def kube_apiserver(*policies: dict[str, Any], team: str | None = None) -> KubeApiserver:
    api = KubeApiserver()
    for number, spec in enumerate(policies):
        api.add(CAPTUREPOLICIES, f"p{number}", spec=spec)
    if team is not None:
        api.add(NAMESPACES, "dev", labels={"team": team})
    return api


async def test_a_policy_holds_in_the_namespaces_that_it_selects() -> None:
    assert (await judged(kube_apiserver(WEB_TEAM, team="web"))).refusal is None
    refusal = (await judged(kube_apiserver(WEB_TEAM, team="db"))).refusal
    assert refusal is not None
    assert (refusal.code, refusal.message) == (403, "policy p0: its namespaceSelector does not select this namespace")


async def test_a_namespace_that_came_a_moment_ago_is_asked_for() -> None:
    api = kube_apiserver(WEB_TEAM)
    api.late["dev"] = {"metadata": {"name": "dev", "labels": {"team": "web"}}}
    assert (await judged(api)).refusal is None


async def test_without_the_labels_of_the_namespace_there_is_no_verdict() -> None:
    answer = await judged(kube_apiserver(WEB_TEAM, {}))
    assert answer.refusal is not None
    assert answer.refusal.code == 500
    assert answer.refusal.message.startswith("the labels of namespace dev are not known")
    assert answer.audit == {"rule": "undecidable"}


async def test_labels_that_no_policy_asks_for_need_not_be_known() -> None:
    assert (await judged(kube_apiserver({}))).refusal is None


async def test_warnings_on_pods_come_with_the_verdict_and_only_when_it_is_good() -> None:
    api = kube_apiserver({"filters": {"deniedPorts": [22]}})
    api.add(PODS, "db", labels={"app": "db"}, spec={})
    answer = await judged(api, capture(filters=[{"ports": [80]}], endTime="2030-01-01T00:30:00Z"))
    assert (answer.refusal, list(answer.warnings)) == (None, ["the selector matches no pod of namespace dev now"])
    refused = await judged(api, capture(filters=[{"ports": [22]}]))
    assert refused.refusal is not None
    assert list(refused.warnings) == []


async def test_pods_are_looked_at_when_a_capture_is_made_and_not_with_every_change_of_it() -> None:
    api = kube_apiserver({})
    old, new = (capture(selector=f"app == '{app}'", endTime="2030-01-01T00:30:00Z") for app in ("a", "b"))
    async with admission(api) as made:
        stamped = patched(new, (await made.stamp(update(old, new))).patch)
        answer = await made.judge(update(old, stamped))
    assert (answer.refusal, list(answer.warnings)) == (None, [])
    assert PODS not in api.lists


async def test_the_time_of_a_running_capture_counts_from_its_creation_which_nobody_else_can_tell() -> None:
    api = kube_apiserver({"limits": {"maxDuration": "1h"}})
    old = capture(endTime="2030-01-01T00:10:00Z")
    old["metadata"]["creationTimestamp"] = "2029-12-31T23:30:00Z"
    new = capture(endTime="2030-01-01T00:45:00Z")
    new["metadata"]["creationTimestamp"] = "2030-01-01T00:00:00Z"
    async with admission(api) as made:
        answer = await made.judge(update(old, new))
        assert answer.refusal is not None
        assert answer.refusal.message == "policy p0: endTime is further ahead than 1h0m0s"
        forged = capture(endTime="2030-01-01T01:30:00Z")
        forged["metadata"]["creationTimestamp"] = "2030-01-01T01:00:00Z"
        answer = await made.judge(create(forged))
        assert answer.refusal is not None
        assert answer.refusal.message == "policy p0: endTime is further ahead than 1h0m0s"


@pytest.mark.parametrize(
    ("before", "after", "is_refused"),
    [
        ({}, {"startTime": "2030-01-01T00:00:00Z"}, True),
        ({"startTime": "2030-01-01T00:00:00Z"}, {"startTime": "2030-01-01T00:00:01Z"}, True),
        ({"startTime": "2029-12-31T22:00:00Z"}, {}, True),
        ({"startTime": "2029-12-31T23:45:00Z"}, {}, False),
        ({"startTime": "2030-01-01T00:00:01Z"}, {"startTime": "2030-01-01T00:30:00Z"}, False),
        ({}, {"snapLength": 128}, False),
    ],
)
async def test_a_capture_that_has_started_can_not_start_later(
    before: dict[str, Any], after: dict[str, Any], *, is_refused: bool
) -> None:
    old, new = capture(**before), capture(**after)
    for item in (old, new):
        item["metadata"]["creationTimestamp"] = "2029-12-31T23:30:00Z"
    async with admission(kube_apiserver({})) as made:
        stamped = patched(new, (await made.stamp(update(old, new))).patch)
        answer = await made.judge(update(old, stamped))
    assert (annotation_of(stamped) is None) is is_refused
    said = None if answer.refusal is None else answer.refusal.message
    assert said == ("a capture that has started can't start later: create another one" if is_refused else None)
