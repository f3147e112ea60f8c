"""`python -m controller`: what one replica at a time does for the whole cluster."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from controller.authority import USUAL, Lifetimes
from controller.bundles import Bundles
from controller.captures import Captures
from controller.events import Events
from controller.leadership import lead, stand
from controller.policies import create_missing
from controller.signer import Signer
from kube.client import Client
from kube.serve import HEALTH_LIMITS, SettingsError, environment, health, listening, number, run

LEASE = "kubepcap-controller"

_DAY = 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class Settings:
    """From the environment."""

    pod: str
    namespace: str
    health_port: int
    counters_interval: timedelta
    lifetimes: Lifetimes

    @classmethod
    def read(cls) -> "Settings":
        """Raises `kube.serve.SettingsError`."""
        return cls(
            pod=environment("POD_NAME"),
            namespace=environment("POD_NAMESPACE"),
            health_port=number("HEALTH_PORT", default=8080, high=65535),
            counters_interval=timedelta(
                seconds=number("COUNTERS_INTERVAL_SECONDS", default=60, low=1, high=3600),
            ),
            lifetimes=_lifetimes(),
        )


def _lifetimes() -> Lifetimes:
    def seconds(name: str, default: timedelta) -> timedelta:
        return timedelta(seconds=number(name, default=int(default.total_seconds()), low=1, high=3650 * _DAY))

    try:
        return Lifetimes(
            ca=seconds("CA_LIFETIME_SECONDS", USUAL.ca),
            propagation=seconds("CA_PROPAGATION_SECONDS", USUAL.propagation),
            leaf=seconds("CERTIFICATE_LIFETIME_SECONDS", USUAL.leaf),
        )
    except ValueError as error:
        raise SettingsError(f"CA_LIFETIME_SECONDS: {error}") from error


async def main() -> None:
    settings = Settings.read()
    async with (
        Client.connect(user_agent="kubepcap-controller") as client,
        # A follower is ready too: there is nothing that it could do wrong.
        listening(health({}), port=settings.health_port, grace=1, limits=HEALTH_LIMITS),
    ):
        await stand(
            lambda: lead(
                client,
                namespace=settings.namespace,
                name=LEASE,
                identity=settings.pod,
                work=lambda: work(client, settings),
            ),
            identity=settings.pod,
        )


async def work(client: Client, settings: Settings) -> None:
    """All of the leader's work, until cancelled. A part that fails ends it, and the process with it."""
    bundles = Bundles(client, namespace=settings.namespace, lifetimes=settings.lifetimes)
    signer = Signer(
        client,
        namespace=settings.namespace,
        authority=lambda: bundles.authority,
        lifetime=settings.lifetimes.leaf,
    )
    events = Events(client, instance=settings.pod)
    captures = Captures(client, events=events, counters_interval=settings.counters_interval)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(captures.run(), name="captures")
        tasks.create_task(events.run(), name="events")
        tasks.create_task(bundles.run(), name="bundles")
        tasks.create_task(create_missing(client, namespace=settings.namespace), name="policies")
        await bundles.published.wait()
        tasks.create_task(signer.run(), name="signer")


if __name__ == "__main__":
    run("controller", main)
