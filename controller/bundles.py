"""Who trusts whom: our CAs kept in a Secret, their certificates published, and put where kube-apiserver looks for them.

What others change is put right again: the objects are watched, and each pass compares all of them with what should be.
"""

import asyncio
import base64
import copy
import logging
import secrets
from collections.abc import Callable, Collection, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from api.names import WEBHOOK_PATH_KEY, WEBHOOK_PATH_SECRET, is_webhook_path
from controller.authority import USUAL, CertificateAuthority, Lifetimes, Plan, plan
from kube.certificates import CA_CONFIGMAP, CA_KEY
from kube.client import (
    APISERVICES,
    CONFIGMAPS,
    MUTATINGWEBHOOKCONFIGURATIONS,
    SECRETS,
    VALIDATINGWEBHOOKCONFIGURATIONS,
    Client,
    Json,
    Resource,
)
from kube.status import StatusError
from kube.watch import Cache, Signal

_log = logging.getLogger(__name__)

CA_SECRET = "kubepcap-ca"  # noqa: S105 - its name
APISERVICE = "v1.subresources.kubepcap.io"
WEBHOOK_CONFIGURATION = "kubepcap"

_RETRY = 5.0
_LONGEST_PAUSE = 3600.0
_LABELS = {"app.kubernetes.io/name": "kubepcap"}


class Bundles:
    """Own `run` in a TaskGroup; `authority` signs once `published` is set."""

    def __init__(
        self,
        client: Client,
        *,
        namespace: str,
        lifetimes: Lifetimes = USUAL,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._lifetimes = lifetimes
        self._clock = clock
        self._signal = Signal()
        self._authorities: dict[str, CertificateAuthority] = {}
        self._secrets = self._follow(SECRETS, CA_SECRET, namespace=namespace, metadata_only=True)
        self._configmaps = self._follow(CONFIGMAPS, CA_CONFIGMAP, namespace=namespace)
        self._trusting = {
            APISERVICES: self._follow(APISERVICES, APISERVICE),
            MUTATINGWEBHOOKCONFIGURATIONS: self._follow(MUTATINGWEBHOOKCONFIGURATIONS, WEBHOOK_CONFIGURATION),
            VALIDATINGWEBHOOKCONFIGURATIONS: self._follow(VALIDATINGWEBHOOKCONFIGURATIONS, WEBHOOK_CONFIGURATION),
        }
        self.published = asyncio.Event()

    @property
    def authority(self) -> CertificateAuthority:
        """The CA that signs now: everyone had time to learn of it, and it stands where kube-apiserver looks.

        The latter may fail for longer than the former takes; where no CA stands, that is no reason to sign nothing.
        """
        known = [ca for ca in self._authorities.values() if self._is_published(ca)]
        signing = self._plan(known, self._clock()).signing
        signing = signing or self._plan(self._authorities.values(), self._clock()).signing
        if signing is None:
            raise RuntimeError("there is no CA yet")
        return signing

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._secrets.run(), name="following our CAs")
            for cache in (self._configmaps, *self._trusting.values()):
                tasks.create_task(cache.run(), name="following what trusts us")
            for cache in (self._configmaps, *self._trusting.values()):
                await cache.synced()
            while True:
                await self._signal.wait(await self._pass())
        raise AssertionError

    async def _pass(self) -> float:
        """Make everything as it should be; returns the seconds until it is to be looked at again."""
        now = self._clock()
        try:
            self._authorities = await self._keep(now)
            bundle = b"".join(ca.certificate_pem for ca in self._plan(self._authorities.values(), now).trusted)
            await self._publish(bundle)
        except StatusError as error:
            _log.warning("the CA could not be published: %s", error.message)
            return _RETRY
        self.published.set()
        pauses = [_LONGEST_PAUSE, (self._plan(self._authorities.values(), now).changes_at - now).total_seconds()]
        for resource, cache in self._trusting.items():
            for item in list(cache.objects.values()):
                try:
                    await self._trust(resource, item, bundle)
                except StatusError as error:
                    _log.warning("%s %s: %s", resource.kind, item["metadata"]["name"], error.message)
                    pauses.append(_RETRY)
        return max(1.0, min(pauses))

    async def _keep(self, now: datetime) -> dict[str, CertificateAuthority]:
        """Our CAs as the Secret holds them. Those in memory go back into it when it was lost, and where it is damaged.

        One whose certificate was taken out of the Secret was withdrawn, and is not to be brought back.
        """
        secret = await _found(self._client.get(SECRETS, CA_SECRET, namespace=self._namespace))
        stored = read_authorities(secret or {})
        held = self._authorities.keys() if secret is None else names_held(secret)
        known = {name: ca for name, ca in self._authorities.items() if name in held} | stored
        for name in self._authorities.keys() - known.keys():
            _log.warning("the CA %s is no longer in the Secret %s: it is withdrawn", name, CA_SECRET)
        planned = self._plan(known.values(), now)
        if planned.create:
            made = CertificateAuthority.create(now, lifetime=self._lifetimes.ca)
            known[made.name] = made
            planned = self._plan(known.values(), now)
            _log.info("a new CA, %s, until %s", made.name, made.expires)
        kept = {ca.name: ca for ca in planned.trusted}
        if kept.keys() != stored.keys():
            await self._store(CA_SECRET, write_authorities(kept), secret)
        return kept

    def _plan(self, authorities: Collection[CertificateAuthority], now: datetime) -> Plan:
        return plan(authorities, now, propagation=self._lifetimes.propagation)

    def _is_published(self, authority: CertificateAuthority) -> bool:
        configmap = self._configmaps.get(CA_CONFIGMAP, self._namespace) or {}
        bundles = [((configmap.get("data") or {}).get(CA_KEY) or "").encode()]
        for resource, cache in self._trusting.items():
            bundles += [bundle for item in cache.objects.values() for bundle in trusted_by(resource, item)]
        return all(authority.certificate_pem in bundle for bundle in bundles)

    async def _publish(self, bundle: bytes) -> None:
        data = {CA_KEY: bundle.decode()}
        configmap = self._configmaps.get(CA_CONFIGMAP, self._namespace)
        if configmap is None:
            body = _new(CONFIGMAPS, CA_CONFIGMAP) | {"data": data}
            await self._client.create(CONFIGMAPS, body, namespace=self._namespace)
        elif configmap.get("data") != data:
            body = configmap | {"data": data}
            await self._client.replace(CONFIGMAPS, CA_CONFIGMAP, body, namespace=self._namespace)

    async def _trust(self, resource: Resource, item: Json, bundle: bytes) -> None:
        if resource is APISERVICES:
            wanted = apiservice_trusting(item, bundle)
        else:
            wanted = webhooks_trusting(item, bundle, path=await self._webhook_path())
        if wanted != item:
            await self._client.replace(resource, item["metadata"]["name"], wanted)
            _log.info("the bundle was put into %s %s", resource.kind, item["metadata"]["name"])

    async def _webhook_path(self) -> str:
        secret = await _found(self._client.get(SECRETS, WEBHOOK_PATH_SECRET, namespace=self._namespace))
        path = _decoded((secret or {}).get("data") or {}).get(WEBHOOK_PATH_KEY, b"").decode(errors="replace")
        if not is_webhook_path(path):
            path = secrets.token_hex(16)
            await self._store(WEBHOOK_PATH_SECRET, {WEBHOOK_PATH_KEY: path.encode()}, secret)
        return path

    async def _store(self, name: str, data: Mapping[str, bytes], old: Json | None) -> None:
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        if old is None:
            body = _new(SECRETS, name) | {"type": "Opaque", "data": encoded}
            await self._client.create(SECRETS, body, namespace=self._namespace)
        else:
            await self._client.replace(SECRETS, name, old | {"data": encoded}, namespace=self._namespace)

    def _follow(
        self, resource: Resource, name: str, *, namespace: str | None = None, metadata_only: bool = False
    ) -> Cache[Json]:
        return Cache(
            self._client,
            resource,
            dict,
            namespace=namespace,
            field_selector=f"metadata.name={name}",
            metadata_only=metadata_only,
            on_change=lambda _: self._signal.set(),
        )


def apiservice_trusting(apiservice: Json, bundle: bytes) -> Json:
    """The APIService with `bundle` (PEM) as what kube-apiserver trusts; all else as it is."""
    wanted = copy.deepcopy(apiservice)
    wanted.setdefault("spec", {})["caBundle"] = base64.b64encode(bundle).decode()
    return wanted


def webhooks_trusting(configuration: Json, bundle: bytes, *, path: str) -> Json:
    """The webhook configuration with `bundle` (PEM), and with the unguessable `path` after `/stamp` and `/judge`.

    A webhook at a URL, as somebody may have set it up for development, keeps its address.
    """
    wanted = copy.deepcopy(configuration)
    for webhook in wanted.get("webhooks") or []:
        address = webhook.setdefault("clientConfig", {})
        address["caBundle"] = base64.b64encode(bundle).decode()
        if "service" in address:
            half = webhook["name"].partition(".")[0]
            address["service"]["path"] = f"/{half}/{path}"
    return wanted


def trusted_by(resource: Resource, item: Json) -> list[bytes]:
    """The bundles (PEM) in an APIService or a webhook configuration."""
    trusting = (
        [item["spec"]] if resource is APISERVICES else [one["clientConfig"] for one in item.get("webhooks") or []]
    )
    return [base64.b64decode(one.get("caBundle") or "") for one in trusting]


def read_authorities(secret: Json) -> dict[str, CertificateAuthority]:
    """The CAs in our Secret: `NAME.crt` and `NAME.key` for each. One that can't be read is left out, and logged."""
    data = _decoded(secret.get("data") or {})
    authorities = {}
    for certificate in (key for key in data if key.endswith(".crt")):
        key = f"{certificate.removesuffix('.crt')}.key"
        try:
            authority = CertificateAuthority.from_pem(certificate=data[certificate], key=data.get(key, b""))
        except ValueError as error:
            _log.error("%s in the Secret %s can't be read: %s", certificate, CA_SECRET, error)
            continue
        authorities[authority.name] = authority
    return authorities


def names_held(secret: Json) -> frozenset[str]:
    """The names of the CAs in our Secret, of those too that can't be read."""
    return frozenset(key.removesuffix(".crt") for key in secret.get("data") or {} if key.endswith(".crt"))


def write_authorities(authorities: Mapping[str, CertificateAuthority]) -> dict[str, bytes]:
    data = {}
    for name, authority in authorities.items():
        data[f"{name}.crt"] = authority.certificate_pem
        data[f"{name}.key"] = authority.key_pem
    return data


def _decoded(data: Mapping[str, Any]) -> dict[str, bytes]:
    decoded = {}
    for key, value in data.items():
        try:
            decoded[key] = base64.b64decode(value, validate=True)
        except (ValueError, TypeError) as error:
            _log.error("%s in a Secret is not base64: %s", key, error)
    return decoded


def _new(resource: Resource, name: str) -> Json:
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": name, "labels": dict(_LABELS)},
    }


async def _found(request: Coroutine[Any, Any, Json]) -> Json | None:
    try:
        return await request
    except StatusError as error:
        if error.code == 404:
            return None
        raise
