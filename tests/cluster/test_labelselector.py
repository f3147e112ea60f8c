"""Label selectors as Kubernetes itself reads and applies them."""

import json
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from api.selector import LabelSelector
from hack.clusters.bare import BareControlPlane
from kube.client import CONFIGMAPS, NAMESPACES, Client, Resource
from kube.status import StatusError

NETWORKPOLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", namespaced=True)

KEYS = ["app", "tier", "example.com/part-of"]
VALUES = ["", "a", "b"]


@pytest.fixture
async def client(control_plane: BareControlPlane) -> AsyncIterator[Client]:
    async with Client.connect(user_agent="tests", kubeconfig=control_plane.kubeconfig) as client:
        yield client


@pytest.fixture
async def namespace(client: Client) -> str:
    name = f"test-{uuid.uuid4().hex[:8]}"
    await client.create(NAMESPACES, {"metadata": {"name": name}})
    return name


def label(key: str) -> dict[str, Any]:
    return {"matchLabels": {key: "x"}}


def value(text: str) -> dict[str, Any]:
    return {"matchLabels": {"app": text}}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}


SELECTORS = [
    {},
    *(
        label(key)
        for key in (
            *("a", "A.b_c-d", "1", "a" * 63, "example.com/a", f"{'a' * 253}/a", f"{'.'.join(['a' * 63] * 3)}/a"),
            *(
                "",
                "a" * 64,
                "-a",
                "a-",
                "a b",
                "é",
                "é" * 32,
                "a\n",
                "a$",
                "/a",
                "a/",
                "/",
                "a/b/c",
                "A.com/a",
                "a..b/a",
            ),
            *("-a/a", "a-/a", f"{'a' * 254}/a", "a_b/c", "a\n/b", "/-"),
        )
    ),
    *(value(text) for text in ("", "a", "1", "A.b_c-d", "a" * 63, "a" * 64, "-", "a-", "a b", "é", "a/b", "a\n")),
    expression("app", "In", "a"),
    expression("app", "In", "a", "a", ""),
    expression("app", "NotIn", "a", "b"),
    expression("app", "Exists"),
    expression("app", "DoesNotExist"),
    expression("app", "In"),
    expression("app", "NotIn"),
    expression("app", "Exists", "a"),
    expression("app", "DoesNotExist", "a", "b"),
    expression("app", "In", "a", "a b", "b", "-"),
    expression("-", "NotIn", "a b"),
    expression("-", "Exists"),
]


def words(error: ValidationError) -> set[tuple[str, str]]:
    """Field and message of each problem."""
    found = set()
    for problem in error.errors():
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        found.add((path, problem["msg"].removeprefix("Value error, ")))
    return found


def causes(error: StatusError) -> set[tuple[str, str]]:
    """The same of Kubernetes, which gives each message of a value on its own."""
    joined: dict[tuple[str, str], list[str]] = {}
    for cause in (error.details or {})["causes"]:
        field = cause["field"].removeprefix("spec.podSelector")
        kind, separator, rest = cause["message"].partition('": ')
        joined.setdefault((field, kind + separator), []).append(rest)
    return {(field, head + "; ".join(rest)) for (field, head), rest in joined.items()}


@pytest.mark.parametrize("given", SELECTORS, ids=lambda given: json.dumps(given)[:80])
async def test_what_kubernetes_refuses_is_refused_and_in_its_words(
    client: Client, namespace: str, given: dict[str, Any]
) -> None:
    policy = {"metadata": {"generateName": "test-"}, "spec": {"podSelector": given, "policyTypes": ["Ingress"]}}
    theirs: set[tuple[str, str]] = set()
    try:
        await client.create(NETWORKPOLICIES, policy, namespace=namespace)
    except StatusError as error:
        theirs = causes(error)
    ours: set[tuple[str, str]] = set()
    try:
        LabelSelector.model_validate(given)
    except ValidationError as error:
        ours = words(error)
    assert ours == theirs


def query(selector: LabelSelector) -> str:
    """As kubectl and kube-apiserver write it."""
    texts = [f"{key}={value}" for key, value in selector.match_labels.items()]
    for each in selector.match_expressions:
        listed = f"({','.join(each.values)})"
        forms = {"In": f"{each.key} in {listed}", "NotIn": f"{each.key} notin {listed}"}
        forms |= {"Exists": each.key, "DoesNotExist": f"!{each.key}"}
        texts.append(forms[each.operator])
    return ",".join(texts)


def any_selector(dice: random.Random) -> LabelSelector:
    def requirement() -> dict[str, Any]:
        operator = dice.choice(["In", "NotIn", "Exists", "DoesNotExist"])
        values = dice.choices(VALUES, k=dice.randrange(1, 4)) if operator in ("In", "NotIn") else []
        return {"key": dice.choice(KEYS), "operator": operator, "values": values}

    return LabelSelector.model_validate(
        {
            "matchLabels": {key: dice.choice(VALUES) for key in KEYS if dice.random() < 0.2},
            "matchExpressions": [requirement() for _ in range(dice.randrange(1, 4))],
        }
    )


async def test_kubernetes_selects_the_same_objects(client: Client, namespace: str) -> None:
    dice = random.Random(6)  # noqa: S311 - the same selectors every time
    objects: dict[str, dict[str, str]] = {}
    for number in range(40):
        name = f"c{number}"
        objects[name] = {key: dice.choice(VALUES) for key in KEYS if dice.random() < 0.6}
        await client.create(CONFIGMAPS, {"metadata": {"name": name, "labels": objects[name]}}, namespace=namespace)
    sizes = set()
    for _ in range(120):
        selector = any_selector(dice)
        found = await client.list(CONFIGMAPS, namespace=namespace, label_selector=query(selector))
        selected = {item["metadata"]["name"] for item in found.items}
        assert {name for name, labels in objects.items() if selector.matches(labels)} == selected, query(selector)
        assert {name for name, labels in objects.items() if selector.to_selector().matches(labels)} == selected
        sizes.add(len(selected))
    assert len(sizes) > 5, "selectors that take few, many, and none"
