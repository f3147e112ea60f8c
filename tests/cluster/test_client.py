"""The client and the caches against a real kube-apiserver."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hack.clusters.bare import BareControlPlane
from kube.client import CONFIGMAPS, NAMESPACES, Client, ConfigurationError, Json, Resource
from kube.status import StatusError
from kube.watch import Cache, Key, Signal


@pytest.fixture
async def client(control_plane: BareControlPlane) -> AsyncIterator[Client]:
    async with Client.connect(user_agent="tests", kubeconfig=control_plane.kubeconfig) as client:
        yield client


@pytest.fixture
async def namespace(client: Client) -> str:
    name = f"test-{uuid.uuid4().hex[:8]}"
    await client.create(NAMESPACES, {"metadata": {"name": name}})
    return name


def configmap(name: str, **data: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def value(item: Json) -> str:
    """The key `value` of a ConfigMap, which must be there."""
    data = item.get("data") or {}
    if "value" not in data:
        raise ValueError("it has no value")
    return str(data["value"])


@asynccontextmanager
async def following(cache: Cache[str]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(cache.run(), name="cache")
        await cache.synced()
        yield
        task.cancel()


async def test_objects_are_written_read_and_deleted(client: Client, namespace: str) -> None:
    created = await client.create(CONFIGMAPS, configmap("a", value="1"), namespace=namespace)
    await client.patch(CONFIGMAPS, "a", {"data": {"value": "2"}}, namespace=namespace)
    await client.apply(CONFIGMAPS, "a", configmap("a", other="3"), namespace=namespace, field_manager="tests")
    assert (await client.get(CONFIGMAPS, "a", namespace=namespace))["data"] == {"value": "2", "other": "3"}
    with pytest.raises(StatusError) as refusal:
        await client.replace(CONFIGMAPS, "a", created | {"data": {}}, namespace=namespace)
    assert refusal.value.code == 409, "it has been changed since"
    await client.delete(CONFIGMAPS, "a", namespace=namespace, uid=created["metadata"]["uid"])
    with pytest.raises(StatusError) as refusal:
        await client.get(CONFIGMAPS, "a", namespace=namespace)
    assert (refusal.value.code, refusal.value.reason) == (404, "NotFound")


async def test_another_object_of_the_name_is_not_deleted(client: Client, namespace: str) -> None:
    await client.create(CONFIGMAPS, configmap("a"), namespace=namespace)
    with pytest.raises(StatusError) as refusal:
        await client.delete(CONFIGMAPS, "a", namespace=namespace, uid=str(uuid.uuid4()))
    assert refusal.value.code == 409


async def test_a_long_list_is_read_in_pages(client: Client, namespace: str) -> None:
    names = [f"c{number:04}" for number in range(1100)]

    async def create(some: list[str]) -> None:
        for name in some:
            await client.create(CONFIGMAPS, configmap(name), namespace=namespace)

    async with asyncio.TaskGroup() as tasks:
        for start in range(20):
            tasks.create_task(create(names[start::20]), name=f"creator {start}")
    listed = await client.list(CONFIGMAPS, namespace=namespace, metadata_only=True)
    assert [item["metadata"]["name"] for item in listed.items] == names
    assert all("data" not in item for item in listed.items)


async def test_no_connection_is_not_taken_for_a_refusal(tmp_path: Path, control_plane: BareControlPlane) -> None:
    away = tmp_path / "kubeconfig"
    away.write_text(control_plane.kubeconfig.read_text().replace(control_plane.url, "https://127.0.0.1:1"))
    async with Client.connect(user_agent="tests", kubeconfig=away) as client:
        with pytest.raises(StatusError) as failure:
            await client.get(NAMESPACES, "default")
    assert failure.value.code == 503


async def test_a_missing_kubeconfig_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no way to kube-apiserver"):
        async with Client.connect(user_agent="tests", kubeconfig=tmp_path / "none"):
            pass


async def test_a_cache_follows_what_was_there_and_what_comes_and_goes(client: Client, namespace: str) -> None:
    await client.create(CONFIGMAPS, configmap("before", value="1"), namespace=namespace)
    changed = Signal()
    cache = Cache(client, CONFIGMAPS, value, namespace=namespace, on_change=lambda _: changed.set())
    async with asyncio.timeout(30), following(cache):
        assert cache.objects == {Key(namespace, "before"): "1"}
        await client.create(CONFIGMAPS, configmap("later", value="2"), namespace=namespace)
        await client.patch(CONFIGMAPS, "before", {"data": {"value": "3"}}, namespace=namespace)
        while cache.objects != {Key(namespace, "before"): "3", Key(namespace, "later"): "2"}:
            await changed.wait()
        await client.delete(CONFIGMAPS, "before", namespace=namespace)
        while cache.get("before", namespace) is not None:
            await changed.wait()
        assert cache.get("later", namespace) == "2"


async def test_a_cache_lists_by_pages_as_large_as_it_is_told(client: Client, namespace: str) -> None:
    names = {f"c{number}" for number in range(5)}
    for name in names:
        await client.create(CONFIGMAPS, configmap(name, value="1"), namespace=namespace)
    pages = [len(page.items) async for page in client.pages(CONFIGMAPS, namespace=namespace, limit=2)]
    assert pages == [2, 2, 1]
    cache = Cache(client, CONFIGMAPS, value, namespace=namespace, page=2)
    async with asyncio.timeout(30), following(cache):
        assert {key.name for key in cache.objects} == names


async def test_an_object_that_cannot_be_read_does_not_hide_the_others(client: Client, namespace: str) -> None:
    await client.create(CONFIGMAPS, configmap("broken"), namespace=namespace)
    await client.create(CONFIGMAPS, configmap("sound", value="1"), namespace=namespace)
    changed = Signal()
    cache = Cache(client, CONFIGMAPS, value, namespace=namespace, on_change=lambda _: changed.set())
    async with asyncio.timeout(30), following(cache):
        assert cache.objects == {Key(namespace, "sound"): "1"}
        assert cache.unparsable == {Key(namespace, "broken"): "it has no value"}
        await client.patch(CONFIGMAPS, "broken", {"data": {"value": "2"}}, namespace=namespace)
        while cache.get("broken", namespace) != "2":
            await changed.wait()
        assert not cache.unparsable


async def test_a_cache_outlives_a_refusal(control_plane: BareControlPlane, client: Client, namespace: str) -> None:
    """It starts without the right to list, and catches up when it gets it."""
    user = f"watcher-{namespace}"
    async with Client.connect(user_agent="tests", kubeconfig=control_plane.kubeconfig_for(user)) as restricted:
        cache = Cache(restricted, CONFIGMAPS, value, namespace=namespace)
        await client.create(CONFIGMAPS, configmap("a", value="1"), namespace=namespace)
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(cache.run(), name="cache")
            await asyncio.sleep(0.5)
            assert not cache.is_synced
            await allow_to_watch(client, user, namespace)
            await cache.synced()
            assert cache.get("a", namespace) == "1"
            task.cancel()


async def allow_to_watch(client: Client, user: str, namespace: str) -> None:
    roles = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role", namespaced=True)
    bindings = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", namespaced=True)
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"]}]
    await client.create(roles, {"metadata": {"name": "watcher"}, "rules": rules}, namespace=namespace)
    binding = {
        "metadata": {"name": "watcher"},
        "roleRef": {"apiGroup": roles.group, "kind": "Role", "name": "watcher"},
        "subjects": [{"apiGroup": roles.group, "kind": "User", "name": user}],
    }
    await client.create(bindings, binding, namespace=namespace)
