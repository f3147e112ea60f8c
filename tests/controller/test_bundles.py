"""What trusts us, and how our CAs are kept."""

import asyncio
import base64
import copy
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import pytest
from cryptography import x509

from controller.authority import USUAL, CertificateAuthority
from controller.bundles import (
    APISERVICE,
    Bundles,
    apiservice_trusting,
    read_authorities,
    webhooks_trusting,
    write_authorities,
)
from kube.client import APISERVICES, CONFIGMAPS, SECRETS, Client, Json, ObjectList, Resource, WatchEvent
from kube.status import StatusError

BUNDLE = b"-----BEGIN CERTIFICATE-----\n"
ENCODED = base64.b64encode(BUNDLE).decode()


def secret(data: dict[str, bytes]) -> dict[str, dict[str, str]]:
    return {"data": {key: base64.b64encode(value).decode() for key, value in data.items()}}


def test_an_apiservice_gets_the_bundle_and_keeps_all_else() -> None:
    given = {"metadata": {"name": "x"}, "spec": {"group": "g", "caBundle": "b2xk"}}
    before = copy.deepcopy(given)
    wanted = apiservice_trusting(given, BUNDLE)
    assert wanted == {"metadata": {"name": "x"}, "spec": {"group": "g", "caBundle": ENCODED}}
    assert given == before
    assert apiservice_trusting(wanted, BUNDLE) == wanted


def test_webhooks_get_the_bundle_and_the_path() -> None:
    service = {"name": "kubepcap-webhook", "namespace": "kubepcap", "port": 443}
    given = {
        "webhooks": [
            {"name": "stamp.kubepcap.io", "clientConfig": {"service": service | {"path": "/old"}}, "timeoutSeconds": 5}
        ]
    }
    wanted = webhooks_trusting(given, BUNDLE, path="secret")
    assert wanted["webhooks"] == [
        {
            "name": "stamp.kubepcap.io",
            "clientConfig": {"service": service | {"path": "/stamp/secret"}, "caBundle": ENCODED},
            "timeoutSeconds": 5,
        }
    ]
    assert webhooks_trusting(wanted, BUNDLE, path="secret") == wanted


def test_a_webhook_at_a_url_keeps_its_address() -> None:
    given = {"webhooks": [{"name": "judge.kubepcap.io", "clientConfig": {"url": "https://127.0.0.1/x"}}]}
    (webhook,) = webhooks_trusting(given, BUNDLE, path="secret")["webhooks"]
    assert webhook["clientConfig"] == {"url": "https://127.0.0.1/x", "caBundle": ENCODED}


def test_cas_survive_the_secret() -> None:
    authorities = [CertificateAuthority.create(datetime(2030, month, 1, tzinfo=UTC)) for month in (1, 2)]
    named = {ca.name: ca for ca in authorities}
    again = read_authorities(secret(write_authorities(named)))
    assert {name: ca.expires for name, ca in again.items()} == {name: ca.expires for name, ca in named.items()}


@pytest.mark.parametrize("damage", ["no key", "no PEM", "no base64", "no ASCII"])
def test_a_damaged_ca_is_left_out_and_logged(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = (CertificateAuthority.create(datetime(2030, 1, 1, tzinfo=UTC)) for _ in range(2))
    stored = secret(write_authorities({good.name: good, bad.name: bad}))
    if damage == "no key":
        del stored["data"][f"{bad.name}.key"]
    else:
        stored["data"][f"{bad.name}.crt"] = {"no PEM": "eA==", "no base64": "%", "no ASCII": "é"}[damage]
    with caplog.at_level(logging.ERROR):
        assert list(read_authorities(stored)) == [good.name]
    assert bad.name in caplog.text


class Cluster:
    """kube-apiserver, as far as bundles go. What `refused` names can't be written."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Resource, str], Json] = {}
        self.refused: set[Resource] = set()
        self._version = 0
        self._watches: dict[Resource, asyncio.Queue[WatchEvent]] = defaultdict(asyncio.Queue)

    async def get(self, resource: Resource, name: str, **_: object) -> Json:
        if (resource, name) not in self.objects:
            raise StatusError(404, f"{name} not found")
        return self.objects[resource, name]

    async def create(self, resource: Resource, body: Json, *, namespace: str | None = None) -> Json:
        return self.put(resource, body | {"metadata": body["metadata"] | {"namespace": namespace}})

    async def replace(self, resource: Resource, _: str, body: Json, **__: object) -> Json:
        if resource in self.refused:
            raise StatusError(403, "a policy refuses it")
        return self.put(resource, body)

    def put(self, resource: Resource, body: Json) -> Json:
        self._version += 1
        known = (resource, body["metadata"]["name"]) in self.objects
        body = body | {"metadata": body["metadata"] | {"resourceVersion": str(self._version)}}
        self.objects[resource, body["metadata"]["name"]] = body
        self._watches[resource].put_nowait(WatchEvent("MODIFIED" if known else "ADDED", body))
        return body

    async def pages(self, resource: Resource, **_: object) -> AsyncIterator[ObjectList]:
        yield ObjectList([body for (kind, _), body in self.objects.items() if kind is resource], "0")

    async def watch(self, resource: Resource, **_: object) -> AsyncIterator[WatchEvent]:
        while True:
            yield await self._watches[resource].get()

    def touch(self) -> None:
        """Let something change, so that all is looked at again."""
        configmap = self.objects[CONFIGMAPS, "kubepcap-ca"]
        self.put(CONFIGMAPS, configmap | {"metadata": configmap["metadata"] | {"annotations": {"a": str(self)}}})

    def trusts(self) -> int:
        """How many CAs kube-apiserver trusts of us."""
        bundle = base64.b64decode(self.objects[APISERVICES, APISERVICE]["spec"].get("caBundle", ""))
        return bundle.count(b"BEGIN CERTIFICATE")

    def publishes(self) -> int:
        return str(self.objects[CONFIGMAPS, "kubepcap-ca"]["data"]["ca.crt"]).count("BEGIN CERTIFICATE")


async def becomes(wanted: int, count: Callable[[], int]) -> None:
    async with asyncio.timeout(10):
        while count() != wanted:  # noqa: ASYNC110 - it is not told when it is done
            await asyncio.sleep(0.01)


async def test_a_ca_does_not_sign_before_kube_apiserver_trusts_it_however_long_that_takes() -> None:
    cluster, now = Cluster(), datetime(2030, 1, 1, tzinfo=UTC)
    cluster.put(APISERVICES, {"metadata": {"name": APISERVICE}, "spec": {}})
    bundles = Bundles(cast("Client", cluster), namespace="kubepcap", clock=lambda: now)
    running = asyncio.create_task(bundles.run())
    await bundles.published.wait()
    await becomes(1, cluster.trusts)
    first = bundles.authority.name

    now += USUAL.ca / 2
    cluster.refused.add(APISERVICES)
    cluster.touch()
    await becomes(2, cluster.publishes)
    now += 2 * USUAL.propagation
    cluster.touch()
    assert cluster.trusts() == 1
    assert bundles.authority.name == first

    cluster.refused.clear()
    cluster.touch()
    await becomes(2, cluster.trusts)
    assert bundles.authority.name != first
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@dataclass
class World:
    """Our bundles, kept up in a cluster where the CA is at half of its life, and so has a successor."""

    cluster: Cluster
    bundles: Bundles

    @property
    def secret(self) -> Json:
        return self.cluster.objects[SECRETS, "kubepcap-ca"]

    @property
    def names(self) -> set[str]:
        return set(read_authorities(self.secret))

    def trusted(self) -> set[str]:
        """The serial numbers of those that kube-apiserver trusts."""
        bundle = base64.b64decode(self.cluster.objects[APISERVICES, APISERVICE]["spec"].get("caBundle", ""))
        return {str(one.serial_number) for one in x509.load_pem_x509_certificates(bundle)}

    def serials(self) -> set[str]:
        """The serial numbers of those in the Secret."""
        return {str(ca.certificate.serial_number) for ca in read_authorities(self.secret).values()}

    def change(self, data: dict[str, str]) -> None:
        self.cluster.put(SECRETS, self.secret | {"data": data})


@pytest.fixture
async def world() -> AsyncIterator[World]:
    cluster, now = Cluster(), datetime(2030, 1, 1, tzinfo=UTC)
    cluster.put(APISERVICES, {"metadata": {"name": APISERVICE}, "spec": {}})
    bundles = Bundles(cast("Client", cluster), namespace="kubepcap", clock=lambda: now)
    running = asyncio.create_task(bundles.run(), name="bundles")
    await bundles.published.wait()
    now += USUAL.ca / 2
    cluster.touch()
    await becomes(2, cluster.trusts)
    yield World(cluster, bundles)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_ca_that_is_taken_out_of_the_secret_is_withdrawn(world: World) -> None:
    old, new = sorted(read_authorities(world.secret).values(), key=lambda ca: ca.made)
    world.change({key: value for key, value in world.secret["data"].items() if not key.startswith(old.name)})
    await becomes(1, world.cluster.trusts)
    assert world.trusted() == world.serials()
    assert world.names == {new.name}
    assert world.bundles.authority.name == new.name


async def test_when_the_secret_is_emptied_a_new_ca_takes_the_place_of_all(world: World) -> None:
    before = world.names
    world.change({})
    await becomes(1, world.cluster.trusts)
    assert world.trusted() == world.serials()
    assert not world.names & before
    assert {world.bundles.authority.name} == world.names


async def test_a_secret_that_is_lost_whole_is_put_back(world: World) -> None:
    before = world.names
    del world.cluster.objects[SECRETS, "kubepcap-ca"]
    world.cluster.touch()
    await becomes(1, lambda: (SECRETS, "kubepcap-ca") in world.cluster.objects)
    assert world.names == before


@pytest.mark.parametrize("half", ["crt", "key"])
async def test_a_ca_that_cannot_be_read_any_more_is_put_back(world: World, half: str) -> None:
    before, damaged = world.names, min(world.names)
    world.change(world.secret["data"] | {f"{damaged}.{half}": "eA=="})
    await becomes(2, lambda: len(world.names))
    assert world.names == before
    assert world.cluster.trusts() == 2
