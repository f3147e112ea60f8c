"""The policies that are shipped with the installation.

They lie in a ConfigMap, because `kubectl apply -k` can't create an object of a kind that it defines in the same run.
One that is missing is created; one that is there is the cluster's own and stays as it is.
"""

import asyncio
import logging

import yaml

from api.capturepolicy import CapturePolicy
from kube.client import CAPTUREPOLICIES, CONFIGMAPS, Client, Json
from kube.status import StatusError
from kube.watch import Cache, Signal

_log = logging.getLogger(__name__)

CONFIGMAP = "kubepcap-policies"
_RETRY = 5.0


def read(configmap: Json) -> dict[str, Json]:
    """The policies by name, from a ConfigMap with a manifest under each key. Raises `ValueError` naming the key."""
    policies: dict[str, Json] = {}
    for key, text in sorted((configmap.get("data") or {}).items()):
        try:
            manifest = yaml.safe_load(text)
            policy = CapturePolicy.model_validate(manifest)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from error
        policies[policy.metadata.name] = manifest
    return policies


async def create_missing(client: Client, *, namespace: str) -> None:
    """Follow the ConfigMap and the policies for ever, and create those that are missing."""
    signal = Signal()
    shipped = Cache(
        client,
        CONFIGMAPS,
        read,
        namespace=namespace,
        field_selector=f"metadata.name={CONFIGMAP}",
        on_change=lambda _: signal.set(),
    )
    existing = Cache(
        client, CAPTUREPOLICIES, lambda policy: policy["metadata"]["uid"], on_change=lambda _: signal.set()
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shipped.run(), name="shipped policies")
        tasks.create_task(existing.run(), name="existing policies")
        await shipped.synced()
        await existing.synced()
        while True:
            missing = {
                name: manifest
                for policies in shipped.objects.values()
                for name, manifest in policies.items()
                if existing.get(name) is None
            }
            failed = [name for name, manifest in missing.items() if not await _create(client, name, manifest)]
            await signal.wait(_RETRY if failed else None)


async def _create(client: Client, name: str, manifest: Json) -> bool:
    try:
        await client.create(CAPTUREPOLICIES, manifest)
    except StatusError as error:
        if error.reason == "AlreadyExists":
            return True
        _log.warning("policy %s could not be created: %s", name, error.message)
        return False
    _log.info("policy %s created", name)
    return True
