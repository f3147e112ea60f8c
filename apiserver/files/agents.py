"""The agents: where they are, and requests to them.

An agent is found by its Pod and known by its certificate, which names its node. The URL of a request names the node as
the certificate does, and a resolver of our own turns that into the Pod's address: so every connection that is reused
was made to, and checked for, that very node.
"""

import logging
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ssl import SSLContext
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from api.names import agent_server_name
from kube.certificates import CLIENT_SIGNER, CLIENT_USAGES, Identity, KeyPair, bundle_cache, client_context
from kube.client import PODS, Client, Json
from kube.watch import Cache

_log = logging.getLogger(__name__)

_LABELS = "app.kubernetes.io/name=kubepcap,app.kubernetes.io/component=agent"
_COMMON_NAME = "kubepcap-apiserver"
_PORT = 8443
_CHUNK = 256 * 1024
# From one chunk to the next; a whole download may take as long as its client does.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30)


class AgentError(Exception):
    """The agent of a node could not be asked; the message names the node and says why."""


@dataclass(frozen=True, slots=True)
class AgentPod:
    """What matters of an agent's Pod."""

    node: str
    address: str
    is_ready: bool
    is_leaving: bool
    created: str

    @classmethod
    def parse(cls, pod: Json) -> Self:
        metadata, status = pod["metadata"], pod.get("status") or {}
        conditions = {c["type"]: c["status"] for c in status.get("conditions") or []}
        return cls(
            node=(pod.get("spec") or {}).get("nodeName", ""),
            address=status.get("podIP", ""),
            is_ready=conditions.get("Ready") == "True",
            is_leaving="deletionTimestamp" in metadata or status.get("phase") in ("Succeeded", "Failed"),
            created=metadata.get("creationTimestamp", ""),
        )


def agent_on(node: str, pods: Iterable[AgentPod]) -> AgentPod | None:
    """The Pod to ask: during an update a node has an old one and a new one."""
    return max(
        (pod for pod in pods if pod.node == node and pod.address),
        key=lambda pod: (not pod.is_leaving, pod.is_ready, pod.created),
        default=None,
    )


class Agents:
    """Requests to agents, over TLS on which both sides show certificates of our CA."""

    def __init__(self, client: Client, *, namespace: str) -> None:
        self.namespace = namespace
        self._pods = Cache(client, PODS, AgentPod.parse, namespace=namespace, label_selector=_LABELS)
        self._identity = Identity(
            client,
            signer=CLIENT_SIGNER,
            usages=CLIENT_USAGES,
            common_name=_COMMON_NAME,
            on_change=self._use_key_pair,
        )
        self._bundles = bundle_cache(client, namespace=namespace, on_change=self._use_bundle)
        self._key_pair: KeyPair | None = None
        self._bundle: bytes | None = None
        self._tls: SSLContext | None = None
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Requests can be made while the block runs."""
        connector = aiohttp.TCPConnector(resolver=_Resolver(self), use_dns_cache=False, limit=256)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=_TIMEOUT,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_CHUNK,
        ) as self._session:
            yield

    async def follow_pods(self) -> None:
        """Follow the agents' Pods for ever."""
        await self._pods.run()

    async def follow_bundle(self) -> None:
        """Follow the CA bundle for ever."""
        await self._bundles.run()

    async def hold_identity(self) -> None:
        """Keep a certificate for ever."""
        await self._identity.run()

    def check(self) -> str | None:
        """What is missing before agents can be asked."""
        if self._bundle is None:
            return "the CA bundle is not read yet"
        if self._key_pair is None:
            return "the client certificate is not obtained yet"
        return None if self._pods.is_synced else "the agents' pods are not listed yet"

    def address(self, node: str) -> str | None:
        """The address of the node's agent."""
        pod = agent_on(node, self._pods.objects.values())
        return pod.address if pod else None

    @asynccontextmanager
    async def request(
        self,
        node: str,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of the node's agent, whose body is still to be read. Raises `AgentError` when there is none.

        What goes wrong while the body is read is an `aiohttp.ClientError` or a `TimeoutError`.
        """
        if self._tls is None or self._session is None:
            raise AgentError(f"the agent of node {node} can't be asked yet: {self.check()}")
        if self.address(node) is None:
            raise AgentError(f"node {node} has no running agent")
        url = URL.build(scheme="https", host=agent_server_name(node), port=_PORT, path=path).with_query(query)
        try:
            response = await self._session.request(method, url, headers=headers, ssl=self._tls, allow_redirects=False)
        except TimeoutError as error:
            raise AgentError(f"the agent of node {node} did not answer in time") from error
        except aiohttp.ClientSSLError as error:
            _log.warning("TLS with the agent of node %s failed: %s", node, error)
            raise AgentError(f"the agent of node {node} did not prove that it is that node's") from error
        except aiohttp.ClientConnectorError as error:
            raise AgentError(f"the agent of node {node} can't be reached: {error.os_error.strerror}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise AgentError(f"the agent of node {node} can't be asked: {error}") from error
        async with response:
            yield response

    def _use_key_pair(self, key_pair: KeyPair) -> None:
        self._key_pair = key_pair
        self._renew_tls()

    def _use_bundle(self, bundle: bytes) -> None:
        self._bundle = bundle
        self._renew_tls()

    def _renew_tls(self) -> None:
        if self._bundle is not None:
            # New connections only: aiohttp keeps connections apart by their context.
            self._tls = client_context(ca=self._bundle, key_pair=self._key_pair) if self._key_pair else None


class _Resolver(AbstractResolver):
    """Resolves the names in agents' certificates, and nothing else."""

    def __init__(self, agents: Agents) -> None:
        self._agents = agents

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - a Pod has the family it has
    ) -> list[ResolveResult]:
        address = self._agents.address(host.removesuffix(agent_server_name("")))
        if address is None:
            raise OSError(f"no agent is known as {host}")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
        ]

    async def close(self) -> None:
        pass
