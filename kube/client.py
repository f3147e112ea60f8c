"""A client of kube-apiserver that speaks JSON objects.

Connection, credentials and their refresh are kubernetes-asyncio's. Its generated models are not used: an object is read
into a type of `api`, or taken apart where it is needed, so that a field which this release does not know is no error.
"""

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes_asyncio.client import ApiClient, Configuration
from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config

from kube.status import StatusError

Json = dict[str, Any]

_PAGE = 500
_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
# A watch ends by itself after `timeoutSeconds`; a silent connection is given up a little later.
_WATCH_SECONDS = 290
_WATCH_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=_WATCH_SECONDS + 10)
# A line of a watch holds an object, and etcd takes none above 1.5 MiB.
_BUFFER = 2 << 20
_METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class ConfigurationError(Exception):
    """There is no usable way to kube-apiserver: neither a ServiceAccount nor a kubeconfig."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of objects as its URL names it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, *, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """The URL's path, every segment quoted."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if namespace is not None:
            if not self.namespaced:
                raise ValueError(f"{self.plural} are not namespaced")
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        if name is not None:
            parts.append(name)
        path = "/" + "/".join(quote(part, safe="") for part in parts)
        return f"{path}/{subresource}" if subresource else path


PODS = Resource("", "v1", "pods", "Pod", namespaced=True)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
SECRETS = Resource("", "v1", "secrets", "Secret", namespaced=True)
CONFIGMAPS = Resource("", "v1", "configmaps", "ConfigMap", namespaced=True)
EVENTS = Resource("events.k8s.io", "v1", "events", "Event", namespaced=True)
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease", namespaced=True)
CERTIFICATESIGNINGREQUESTS = Resource(
    "certificates.k8s.io", "v1", "certificatesigningrequests", "CertificateSigningRequest", namespaced=False
)
APISERVICES = Resource("apiregistration.k8s.io", "v1", "apiservices", "APIService", namespaced=False)
MUTATINGWEBHOOKCONFIGURATIONS = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "mutatingwebhookconfigurations",
    "MutatingWebhookConfiguration",
    namespaced=False,
)
VALIDATINGWEBHOOKCONFIGURATIONS = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "validatingwebhookconfigurations",
    "ValidatingWebhookConfiguration",
    namespaced=False,
)
SUBJECTACCESSREVIEWS = Resource(
    "authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", namespaced=False
)
TOKENREVIEWS = Resource("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", namespaced=False)
PACKETCAPTURES = Resource("kubepcap.io", "v1", "packetcaptures", "PacketCapture", namespaced=True)
CAPTUREPOLICIES = Resource("kubepcap.io", "v1", "capturepolicies", "CapturePolicy", namespaced=False)
CAPTURENODES = Resource("kubepcap.io", "v1", "capturenodes", "CaptureNode", namespaced=False)


@dataclass(frozen=True, slots=True)
class ObjectList:
    """A consistent list, and the version from which a watch goes on."""

    items: list[Json]
    resource_version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change, as the watch stream tells it. A BOOKMARK's object carries nothing but its version."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Json


class Client:
    """Requests to kube-apiserver as one user. Every method raises `StatusError`.

    A connection that could not be made, or that broke, is a `StatusError` with code 503, an answer that did not come in
    time one with 504: callers tell "no" from "not now" by the code.
    """

    def __init__(self, api_client: ApiClient) -> None:
        self._api_client = api_client

    @classmethod
    @asynccontextmanager
    async def connect(cls, *, user_agent: str, kubeconfig: Path | None = None) -> AsyncIterator[Self]:
        """Connect with `kubeconfig`, else with the pod's ServiceAccount, else with $KUBECONFIG.

        Raises `ConfigurationError` when none of them is there or the one there can't be read.
        """
        configuration = Configuration()
        try:
            if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                await load_kube_config(
                    config_file=str(kubeconfig) if kubeconfig else None, client_configuration=configuration
                )
        except (ConfigException, OSError) as error:
            raise ConfigurationError(f"no way to kube-apiserver: {error}") from error
        configuration.proxy = configuration.proxy or _proxy(configuration.host or "")
        async with ApiClient(configuration) as api_client:
            api_client.user_agent = user_agent
            _stop_looking_for_proxies(api_client)
            yield cls(api_client)

    async def get(
        self, resource: Resource, name: str, *, namespace: str | None = None, subresource: str | None = None
    ) -> Json:
        return await self._request("GET", resource.path(namespace=namespace, name=name, subresource=subresource))

    async def list(
        self,
        resource: Resource,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
    ) -> ObjectList:
        """All objects, fetched in pages. A list that changes too much meanwhile is a `StatusError` with code 410."""
        items: list[Json] = []
        version = ""
        async for page in self.pages(
            resource,
            namespace=namespace,
            label_selector=label_selector,
            field_selector=field_selector,
            metadata_only=metadata_only,
        ):
            items += page.items
            version = page.resource_version
        return ObjectList(items, version)

    async def pages(
        self,
        resource: Resource,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
        limit: int = _PAGE,
        most_bytes: int | None = None,
    ) -> AsyncIterator[ObjectList]:
        """The same page by page, `limit` objects at most in each, for those too large to be held all at once.

        A page of more than `most_bytes` is read no further, and is a `StatusError` with code 413.
        """
        query = _selectors(label_selector, field_selector) | {"limit": str(limit)}
        headers = {"Accept": _METADATA_LIST} if metadata_only else {}
        if most_bytes is not None:
            # What is compressed may be of any size once it is not.
            headers["Accept-Encoding"] = "identity"
        path = resource.path(namespace=namespace)
        while True:
            page = await self._request("GET", path, query=query, headers=headers, most_bytes=most_bytes)
            metadata = page.get("metadata") or {}
            yield ObjectList(page.get("items") or [], metadata.get("resourceVersion", ""))
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    async def create(
        self,
        resource: Resource,
        body: Json,
        *,
        namespace: str | None = None,
        name: str | None = None,
        subresource: str | None = None,
    ) -> Json:
        path = resource.path(namespace=namespace, name=name, subresource=subresource)
        return await self._request("POST", path, body=body)

    async def replace(
        self, resource: Resource, name: str, body: Json, *, namespace: str | None = None, subresource: str | None = None
    ) -> Json:
        """Write the whole object; with its `metadata.resourceVersion`, a change by someone else is code 409."""
        path = resource.path(namespace=namespace, name=name, subresource=subresource)
        return await self._request("PUT", path, body=body)

    async def patch(
        self,
        resource: Resource,
        name: str,
        patch: Json,
        *,
        namespace: str | None = None,
        subresource: str | None = None,
    ) -> Json:
        """A JSON merge patch (RFC 7396)."""
        path = resource.path(namespace=namespace, name=name, subresource=subresource)
        return await self._request("PATCH", path, body=patch, content_type="application/merge-patch+json")

    async def apply(
        self,
        resource: Resource,
        name: str,
        body: Json,
        *,
        field_manager: str,
        namespace: str | None = None,
        subresource: str | None = None,
    ) -> None:
        """Server-side apply; fields that another manager owns are taken over. The object does not come back."""
        path = resource.path(namespace=namespace, name=name, subresource=subresource)
        query = {"fieldManager": field_manager, "force": "true"}
        await self._request(
            "PATCH",
            path,
            query=query,
            body=body,
            headers={"Accept": _METADATA},
            content_type="application/apply-patch+yaml",
        )

    async def delete(
        self,
        resource: Resource,
        name: str,
        *,
        namespace: str | None = None,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """Delete the object, on condition that it is still the one with that UID and version (else code 409)."""
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        options: Json = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if given := {key: value for key, value in preconditions.items() if value is not None}:
            options["preconditions"] = given
        await self._request("DELETE", resource.path(namespace=namespace, name=name), body=options)

    async def watch(
        self,
        resource: Resource,
        *,
        resource_version: str,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
    ) -> AsyncIterator[WatchEvent]:
        """The changes after `resource_version`, until the server ends the stream (after about five minutes).

        Raises `StatusError` with code 410 when that version is no longer known: list again.
        """
        query = _selectors(label_selector, field_selector) | {
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        async with self._send(
            "GET",
            resource.path(namespace=namespace),
            query=query,
            headers={"Accept": _METADATA} if metadata_only else None,
            limits=_WATCH_TIMEOUT,
        ) as response:
            async for line in _lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise StatusError.parse(int(status.get("code") or 500), json.dumps(status).encode())
                yield WatchEvent(event["type"], event["object"])

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        most_bytes: int | None = None,
    ) -> Json:
        async with self._send(
            method, path, query=query, body=body, headers=headers, content_type=content_type, limits=_TIMEOUT
        ) as response:
            read = await (response.read() if most_bytes is None else _read(response, most_bytes))
            answer = json.loads(read)
        if not isinstance(answer, dict):
            raise StatusError(500, f"{method} {path}: the answer is no JSON object")
        return answer

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        response: aiohttp.ClientResponse | None = None
        try:
            response = await self._api_client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json", "Content-Type": content_type, **(headers or {})},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=limits,
            )
            if not response.ok:
                raise StatusError.parse(response.status, await response.read())
            yield response
        except TimeoutError as error:
            raise StatusError(504, f"{method} {path}: no answer in time") from error
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            raise StatusError(503, f"{method} {path}: {str(error) or type(error).__name__}") from error
        finally:
            if response is not None:
                response.close()


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL (HTTPS_PROXY, NO_PROXY and the like)."""
    address = urlsplit(url)
    return None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)


def _stop_looking_for_proxies(api_client: ApiClient) -> None:
    """The library's session asks the environment and ~/.netrc anew for each request, in a thread each time."""
    rest = api_client.rest_client
    session = rest.pool_manager
    rest.pool_manager = aiohttp.ClientSession(
        connector=session.connector, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=_BUFFER
    )
    session.detach()


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The body, if it has no more than `most_bytes`. Raises `StatusError` (413)."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > most_bytes:
            raise StatusError(413, f"the answer has more than {most_bytes} bytes")
    return bytes(body)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The stream's lines; aiohttp's own reader refuses lines longer than its buffer, and objects may be 1.5 MiB."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            line = bytes(rest) + chunk[start:end]
            rest.clear()
            start = end + 1
            if line:
                yield line
        rest += chunk[start:]


def _selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {key: value for key, value in selectors.items() if value}
