"""The aggregated API server: `python -m apiserver`.

It starts to listen at once and says through readiness what it still waits for, so that nothing depends on the order in
which the parts of an installation come up.
"""

import asyncio
from dataclasses import dataclass
from typing import Self

from api.capturenode import CaptureNode
from apiserver.aggregation.authentication import Authenticator
from apiserver.aggregation.authorization import Authorizer
from apiserver.aggregation.metrics import Metrics
from apiserver.aggregation.server import Server
from apiserver.files.agents import Agents
from apiserver.files.download import Download
from apiserver.files.group import schemas, subresources
from apiserver.files.listing import Listing
from kube.certificates import SERVING_SIGNER, SERVING_USAGES, Identity, KeyPair, ServerTLS
from kube.client import CAPTURENODES, Client
from kube.connections import Limits
from kube.serve import HEALTH_LIMITS, environment, health, listening, number, run
from kube.watch import Cache

_NAME = "kubepcap-apiserver"
_VERSION = "v0.1.0"
_STALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """From the environment. Times in seconds; both have to fit into the Pod's termination grace period."""

    namespace: str
    port: int
    health_port: int
    drain: int
    grace: int
    downloads_per_user: int
    connections: int

    @classmethod
    def read(cls) -> Self:
        """Raises `SettingsError`."""
        return cls(
            namespace=environment("POD_NAMESPACE", "kubepcap"),
            port=number("PORT", default=8443, high=65535),
            health_port=number("HEALTH_PORT", default=8080, high=65535),
            drain=number("DRAIN_SECONDS", default=10, high=600),
            grace=number("GRACE_SECONDS", default=70, high=3600),
            downloads_per_user=number("DOWNLOADS_PER_USER", default=8, low=1, high=1000),
            connections=number("MAX_CONNECTIONS", default=512, low=16, high=65536),
        )


async def main() -> None:
    settings = Settings.read()
    async with Client.connect(user_agent=_NAME) as client:
        await serve(client, settings)


async def serve(client: Client, settings: Settings) -> None:
    """Serve until cancelled; what is under way then gets `grace` seconds to end."""
    metrics = Metrics()
    tls = ServerTLS(client_certificates="optional")

    def use_key_pair(key_pair: KeyPair) -> None:
        tls.use(key_pair=key_pair)

    identity = Identity(
        client,
        signer=SERVING_SIGNER,
        usages=SERVING_USAGES,
        common_name=_NAME,
        dns_names=[f"{_NAME}.{settings.namespace}.svc"],
        on_change=use_key_pair,
    )
    authenticator = Authenticator(client, on_trust=lambda ca: tls.use(client_ca=ca), on_review=metrics.token_reviewed)
    authorizer = Authorizer(client, on_review=metrics.access_reviewed)
    agents = Agents(client, namespace=settings.namespace)
    nodes = Cache(client, CAPTURENODES, CaptureNode.model_validate)
    listing = Listing(client, nodes=nodes, agents=agents)
    download = Download(client, nodes=nodes, agents=agents, listing=listing)
    server = Server(
        groups=[subresources(listing, download)],
        schemas=schemas(),
        title="kubepcap",
        version=_VERSION,
        authenticator=authenticator,
        authorizer=authorizer,
        checks={
            "certificate": lambda: None if identity.current else "the serving certificate is not obtained yet",
            "agents": agents.check,
            "capturenodes": lambda: None if nodes.is_synced else "not listed yet",
        },
        metrics=metrics,
        streams_per_user=settings.downloads_per_user,
    )
    background = {
        "certificate": identity.run,
        "authentication": authenticator.run,
        "authorization": authorizer.run,
        "agents' pods": agents.follow_pods,
        "CA bundle": agents.follow_bundle,
        "client certificate": agents.hold_identity,
        "capturenodes": nodes.run,
    }
    async with (
        agents.connected(),
        asyncio.TaskGroup() as tasks,
        listening(health(server.checks, metrics=metrics.exposition), port=settings.health_port, limits=HEALTH_LIMITS),
        listening(
            server.application(),
            port=settings.port,
            tls=tls,
            drain=settings.drain,
            grace=settings.grace,
            on_drain=server.drain,
            limits=Limits(connections=settings.connections, stall=_STALL_SECONDS),
            on_loss=metrics.lost,
            cancels_abandoned=True,
        ),
    ):
        for name, task in background.items():
            tasks.create_task(task(), name=name)
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(_NAME, main)
