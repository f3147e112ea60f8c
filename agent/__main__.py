"""`python -m agent`: the node agent, the container without any capability."""

from pathlib import Path

from agent.agent import NAME, Agent, Settings
from agent.disk import Limits
from agent.reconcile import NodeLimits
from agent.report import Intervals
from kube.client import Client
from kube.serve import environment, flag, number, run

_GIGABYTE = 10**9


def settings() -> Settings:
    """From the environment. Raises `SettingsError`."""
    return Settings(
        node=environment("NODE_NAME"),
        pod=environment("POD_NAME"),
        namespace=environment("POD_NAMESPACE", "kubepcap"),
        socket=Path(environment("CAPTURER_SOCKET", "/run/kubepcap/capturer.sock")),
        directory=Path(environment("DATA_DIRECTORY", "/var/lib/kubepcap")),
        port=number("PORT", default=8443, high=65535),
        health_port=number("HEALTH_PORT", default=8080, high=65535),
        direct=flag("DIRECT_IO", default=False),
        node_limits=NodeLimits(
            targets=number("MAX_TARGETS", default=256, low=1, high=100_000),
            ring_bytes=number("MAX_RING_BYTES", default=1 << 30, low=1 << 19, high=1 << 40),
        ),
        limits=Limits(
            namespace=number("MAX_NAMESPACE_BYTES", default=5 * _GIGABYTE, high=1 << 50),
            used=number("MAX_USED_BYTES", default=10 * _GIGABYTE, high=1 << 50),
            free=number("MIN_FREE_BYTES", default=1 * _GIGABYTE, high=1 << 50),
            free_percent=number("MIN_FREE_PERCENT", default=12, high=90),
        ),
        intervals=Intervals(
            counters=number("COUNTERS_SECONDS", default=30, low=1, high=3600),
            heartbeat=number("HEARTBEAT_SECONDS", default=30, low=1, high=3600),
        ),
    )


async def main() -> None:
    configured = settings()
    async with Client.connect(user_agent=NAME) as client:
        await Agent(client, configured).run()


if __name__ == "__main__":
    run(NAME, main)
