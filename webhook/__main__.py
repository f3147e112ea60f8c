"""`python -m webhook`: stamps and judges captures for kube-apiserver."""

import asyncio
from dataclasses import dataclass

from kube.certificates import SERVING_SIGNER, SERVING_USAGES, Identity, ServerTLS
from kube.client import Client
from kube.serve import HEALTH_LIMITS, environment, health, listening, number, run
from webhook.admission import Admission
from webhook.server import LIMITS, application, path_cache


@dataclass(frozen=True, slots=True)
class Settings:
    """From the environment; ports are TCP, `drain` is in seconds."""

    namespace: str
    port: int
    health_port: int
    drain: int

    @classmethod
    def read(cls) -> "Settings":
        """Raises `kube.serve.SettingsError`."""
        return cls(
            namespace=environment("POD_NAMESPACE"),
            port=number("PORT", default=8443, high=65535),
            health_port=number("HEALTH_PORT", default=8080, high=65535),
            drain=number("DRAIN_SECONDS", default=5, high=300),
        )


async def main() -> None:
    settings = Settings.read()
    tls = ServerTLS(client_certificates="none")
    draining = asyncio.Event()
    async with Client.connect(user_agent="kubepcap-webhook") as client:
        admission = Admission(client)
        path = path_cache(client, namespace=settings.namespace)
        identity = Identity(
            client,
            signer=SERVING_SIGNER,
            usages=SERVING_USAGES,
            common_name="kubepcap-webhook",
            dns_names=[f"kubepcap-webhook.{settings.namespace}.svc"],
            on_change=lambda key_pair: tls.use(key_pair=key_pair),
        )
        checks = {
            "certificate": lambda: None if tls.is_usable else "none has been issued yet",
            "policies": lambda: None if admission.policies.is_synced else "they are not known yet",
            "namespaces": lambda: None if admission.namespaces.is_synced else "they are not known yet",
            "path": lambda: None if path.objects else "the controller has not chosen it yet",
            "shutdown": lambda: "the server is about to stop" if draining.is_set() else None,
        }
        app = application(admission, paths=lambda: frozenset(path.objects.values()))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(identity.run(), name="identity")
            tasks.create_task(admission.policies.run(), name="policies")
            tasks.create_task(admission.namespaces.run(), name="namespaces")
            tasks.create_task(path.run(), name="path")
            async with (
                listening(health(checks), port=settings.health_port, grace=1, limits=HEALTH_LIMITS),
                listening(
                    app,
                    port=settings.port,
                    tls=tls,
                    drain=settings.drain,
                    on_drain=draining.set,
                    limits=LIMITS,
                ),
            ):
                await asyncio.Event().wait()


if __name__ == "__main__":
    run("webhook", main)
