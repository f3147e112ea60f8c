"""The labels of namespaces, by which policies choose where they hold."""

import asyncio
from typing import NoReturn

from api.object import ObjectMeta
from api.selector import Labels
from kube.client import NAMESPACES, Client
from kube.status import StatusError, internal_error
from kube.watch import Cache

_PATIENCE = 1.0
"""Seconds; kube-apiserver gives the whole review five."""


class Namespaces:
    """Follows the labels of all namespaces; own `run()` in a TaskGroup."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._cache = Cache(
            client, NAMESPACES, lambda item: ObjectMeta.model_validate(item["metadata"]).labels, metadata_only=True
        )

    @property
    def is_synced(self) -> bool:
        return self._cache.is_synced

    async def synced(self) -> None:
        await self._cache.synced()

    async def run(self) -> NoReturn:
        await self._cache.run()

    async def labels(self, name: str) -> Labels:
        """The labels of a namespace, of one that came a moment ago too. Raises `StatusError` (500)."""
        labels = self._cache.get(name)
        if labels is not None:
            return labels
        try:
            async with asyncio.timeout(_PATIENCE):
                item = await self._client.get(NAMESPACES, name)
            return ObjectMeta.model_validate(item["metadata"]).labels
        except (StatusError, TimeoutError, ValueError) as error:
            failure = str(error) or "no answer in time"
            raise internal_error(f"the labels of namespace {name} are not known: {failure}") from error
