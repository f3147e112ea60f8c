"""Stands in for the connection to kube-apiserver: what it lists, and who may do what."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from kube.client import CAPTUREPOLICIES, NAMESPACES, PODS, Client, ObjectList, Resource
from kube.status import StatusError

Json = dict[str, Any]


class KubeApiserver:
    """`may(user, attributes)` answers SubjectAccessReviews; what is asked is kept."""

    def __init__(self, *, may: Callable[[str, Json], bool] = lambda *_: True) -> None:
        self.objects: dict[Resource, list[Json]] = {CAPTUREPOLICIES: [], NAMESPACES: [], PODS: []}
        self.late: dict[str, Json] = {}
        """Namespaces that no list has shown yet."""
        self.failing: set[Resource] = set()
        self.silent: set[Resource] = set()
        """What no list of ever comes."""
        self.lists: list[Resource] = []
        self.most_bytes: list[int | None] = []
        """That each of these lists may have."""
        self.at_once = 0
        self.most_at_once = 0
        """Silent lists that were waited for at the same time."""
        self.may = may

    @property
    def client(self) -> Client:
        return cast("Client", self)

    def add(self, resource: Resource, name: str, **more: Any) -> None:
        labels = more.pop("labels", {})
        metadata = {"name": name, "resourceVersion": "1", "labels": labels}
        self.objects[resource].append({"metadata": metadata} | more)

    async def pages(
        self, resource: Resource, *, limit: int = 500, most_bytes: int | None = None, **_: Any
    ) -> AsyncIterator[ObjectList]:
        self.lists.append(resource)
        self.most_bytes.append(most_bytes)
        if resource in self.silent:
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
            try:
                await asyncio.Event().wait()
            finally:
                self.at_once -= 1
        if resource in self.failing:
            raise StatusError(503, "away")
        items = self.objects[resource]
        for start in range(0, max(1, len(items)), limit):
            yield ObjectList(items[start : start + limit], "1")

    async def watch(self, *_: Any, **__: Any) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    async def get(self, resource: Resource, name: str) -> Json:
        if name not in self.late:
            raise StatusError(404, f'{resource.plural} "{name}" not found')
        return self.late[name]

    async def create(self, _: Resource, body: Json) -> Json:
        spec = body["spec"]
        return {"status": {"allowed": self.may(spec["user"], spec["resourceAttributes"])}}
