"""A thousand and more random reviews over HTTP: no 5xx, and nothing allowed that a second implementation denies."""

import asyncio
import copy
import io
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.stamp import ANNOTATION
from kube.client import CAPTUREPOLICIES, NAMESPACES
from kube.serve import listening
from tests.api.reference import Json, Tree
from tests.api.strategies import CASES, NAMESPACE_LABELS, NOW, denied, manifests
from tests.webhook.cases import capture, patched_by
from tests.webhook.standin import KubeApiserver
from webhook.admission import Admission
from webhook.server import LIMITS, application

PATH = "0123456789abcdef"
AT_A_TIME = 10
MANY = max(500, settings().max_examples)
"""Reviews of each of two kinds; --hypothesis-profile=soak makes them 100,000."""

Case = tuple[Json, Json, Tree | Json]


class Webhook:
    """The webhook as kube-apiserver calls it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, half: str, body: bytes) -> tuple[int, Any]:
        async with self._session.post(f"/{half}/{PATH}", data=io.BytesIO(body)) as answer:
            return answer.status, json.loads(await answer.read())

    async def verdict(self, review: Json) -> Json | None:
        """The answer to a review that is stamped first; None when it is refused as a request."""
        status, answer = await self.post("stamp", json.dumps(review).encode())
        assert status in (200, 400, 413), answer
        if status != 200:
            assert answer["kind"] == "Status"
            return None
        assert answer["response"]["allowed"] is True
        stamped = copy.deepcopy(review)
        stamped["request"]["object"] = patched_by(review["request"].get("object"), answer["response"])
        status, answer = await self.post("judge", json.dumps(stamped).encode())
        assert status == 200, answer
        response: Json = answer["response"]
        return response


@asynccontextmanager
async def webhook(api: KubeApiserver) -> AsyncIterator[Webhook]:
    admission = Admission(api.client, clock=lambda: datetime.fromtimestamp(NOW, UTC))
    app = application(admission, paths=lambda: frozenset({PATH}))
    async with listening(app, port=0, host="127.0.0.1", grace=0, limits=LIMITS) as port:
        following = [asyncio.create_task(admission.policies.run()), asyncio.create_task(admission.namespaces.run())]
        try:
            await admission.policies.synced()
            await admission.namespaces.synced()
            async with aiohttp.ClientSession(base_url=f"http://127.0.0.1:{port}") as session:
                yield Webhook(session)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


def review(item: Any, *, user: str, operation: str = "CREATE", old: Any = None) -> Json:
    request = {
        "uid": f"of {user}",
        "resource": {"group": "kubepcap.io", "version": "v1", "resource": "packetcaptures"},
        "name": "web",
        "namespace": "dev",
        "operation": operation,
        "userInfo": {"username": user, "groups": ["system:authenticated"]},
        "object": item,
        "oldObject": old,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def asked_for(case: Case) -> Json:
    item = capture()
    item["spec"] = manifests(case)[1]
    return item


def kube_apiserver(cases: list[Case], rights: list[set[int]], namespace: dict[str, str]) -> KubeApiserver:
    """One that knows the policies of all cases; user N may use those of `rights[N]`."""
    api = KubeApiserver(
        may=lambda user, attributes: (
            attributes["verb"] == "use" and int(attributes["name"].removeprefix("p")) in rights[int(user)]
        )
    )
    for number, case in enumerate(cases):
        api.add(CAPTUREPOLICIES, f"p{number}", spec=manifests(case)[0])
    api.add(NAMESPACES, "dev", labels=namespace)
    return api


_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=MANY // AT_A_TIME, deadline=None, suppress_health_check=_SLOW)
@given(
    st.lists(CASES, min_size=AT_A_TIME, max_size=AT_A_TIME),
    st.lists(st.sets(st.integers(0, AT_A_TIME - 1), max_size=4), min_size=AT_A_TIME, max_size=AT_A_TIME),
    NAMESPACE_LABELS,
)
async def test_nothing_is_allowed_that_no_usable_policy_allows(
    cases: list[Case], rights: list[set[int]], namespace: dict[str, str]
) -> None:
    async with webhook(kube_apiserver(cases, rights, namespace)) as served:
        for user, case in enumerate(cases):
            answer = await served.verdict(review(asked_for(case), user=str(user)))
            assert answer is not None
            _, spec, selector = case
            allowing = [
                other for other in rights[user] if not denied((cases[other][0], spec, selector), namespace=namespace)
            ]
            if answer["allowed"]:
                assert allowing
            else:
                assert answer["status"]["code"] in (403, 422), answer


_JUNK: list[Any] = [
    *(None, True, 0, -1, 1e308, 2**70, "", "x", "\0", "\ud7ff\U0010ffff", "a" * 100_000, [], {}, [[]], {"": {}}),
    *({"a": 1}, [None], ["x"] * 300, [1] * 300, {str(number): number for number in range(300)}, "9" * 5000),
    *("2030-02-30T00:00:00Z", "all()", "((((", "!" * 5000, "1h" * 50, "100000000000T", "65536:1"),
]


def spoilt(item: Any, chance: random.Random) -> Any:
    """The same JSON with junk in one or two of its places."""
    item = copy.deepcopy(item)
    for _ in range(chance.randint(1, 2)):
        parent, key = chance.choice(list(_places(item)))
        parent[key] = copy.deepcopy(chance.choice(_JUNK))
    return item


def _places(item: Any) -> Any:
    entries = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in entries:
        yield item, key
        yield from _places(value)


@settings(max_examples=MANY // AT_A_TIME, deadline=None, suppress_health_check=_SLOW)
@given(CASES, st.integers(0, 2**32))
async def test_what_is_spoilt_gets_a_clean_answer(case: Case, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - hypothesis gives the seed
    api = kube_apiserver([case], [{0}], {})
    async with webhook(api) as served:
        for _ in range(AT_A_TIME):
            item, old = asked_for(case), asked_for(case)
            old["metadata"]["annotations"] = {ANNOTATION: "{}"}
            whole = review(item, user="0", operation=chance.choice(["CREATE", "UPDATE"]), old=old)
            if chance.random() < 0.7:
                part = chance.choice(["object", "oldObject"])
                whole["request"][part] = spoilt(whole["request"][part], chance)
            else:
                whole = spoilt(whole, chance)
            api.may = lambda user, _: user == "0"
            if isinstance(whole.get("request"), dict):
                answer = await served.verdict(whole)
                assert answer is None or answer["allowed"] or answer["status"]["code"] in (403, 422), answer
            body = json.dumps(whole).encode()
            cut = body[: chance.randrange(len(body))] + chance.choice([b"", b"\xff", b"\x00", b"]", b"}"])
            for half in ("stamp", "judge"):
                status, said = await served.post(half, cut)
                assert (status, said["kind"]) == (400, "Status")


def _large(**fields: Any) -> Json:
    item = capture()
    item["spec"] |= fields
    return item


@pytest.mark.parametrize(
    "item",
    [
        _large(selector="a" * 3_000_000),
        _large(selector=" || ".join(f"a == '{number}'" for number in range(150_000))),
        _large(filters=[{"protocol": "TCP", "ports": [80]}] * 80_000),
        _large(filters=[{"ports": list(range(1, 60_000))}] * 9),
        _large(selector=None, podSelector={"matchLabels": {f"key{number}": 1 for number in range(150_000)}}),
        _large(selector=None, podSelector={"matchLabels": {f"key{number}": "x" for number in range(150_000)}}),
        _large(selector=None, podSelector={"matchExpressions": [{"key": "a", "operator": "Is"}] * 90_000}),
        capture() | {"metadata": {"name": "web", "annotations": {f"a/{number}": "x" for number in range(200_000)}}},
        capture() | {"status": {"nodes": [{"node": "n", "state": "Capturing"}] * 80_000}},
    ],
    ids=["word", "terms", "filters", "ports", "wrong labels", "labels", "expressions", "annotations", "status"],
)
async def test_three_megabytes_get_a_short_answer(item: Json) -> None:
    api = KubeApiserver()
    api.add(CAPTUREPOLICIES, "p0", spec={"selectors": {"requiredKeys": ["app"], "allowEmpty": True}})
    async with webhook(api) as served:
        assert 2_000_000 < len(json.dumps(item)) < 7_000_000
        answer = await served.verdict(review(item, user="0"))
        assert answer is not None
        assert len(json.dumps(answer)) < 10_000
        assert answer["allowed"] or answer["status"]["code"] in (403, 422)
