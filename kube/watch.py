"""A cache of objects that follows kube-apiserver by list and watch.

What client-go calls a reflector and a store, in one. Programs decide from caches and are woken by a `Signal`: they look
at all of the state each time instead of reacting to single events, so an event that was missed can't make them wrong.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Generic, NamedTuple, NoReturn, TypeVar

from kube.client import Client, Json, Resource
from kube.status import StatusError

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_DELAY = 0.25
_LONGEST_DELAY = 30.0


class Key(NamedTuple):
    """Where an object lives; the namespace is None for a cluster-scoped one."""

    namespace: str | None
    name: str


class Signal:
    """Wakes one waiter. Setting it many times before it is waited for is the same as setting it once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - a pause, not a deadline of a request
        """Wait for `set`, at most `timeout` seconds, and clear it. True when it was set."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Cache(Generic[T]):
    """All objects of a resource that match the selectors, each read by `parse`.

    An object that `parse` refuses (by a `ValueError`, as pydantic does), or fails on in any other way, is left out of
    `objects`, listed in `unparsable` with the reason, and logged: it never takes the others with it. `on_change` is
    called after each change with its key. What reads the same as before has not changed, and the object stays the one
    it was. `page` objects at most are fetched at a time when all are listed.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource,
        parse: Callable[[Json], T],
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
        on_change: Callable[[Key], None] | None = None,
        page: int = 500,
    ) -> None:
        self._client = client
        self._resource = resource
        self._parse = parse
        self._namespace = namespace
        self._label_selector = label_selector
        self._field_selector = field_selector
        self._metadata_only = metadata_only
        self._on_change = on_change
        self._page = page
        self._objects: dict[Key, T] = {}
        self._versions: dict[Key, str] = {}
        self._unparsable: dict[Key, str] = {}
        self._synced = asyncio.Event()
        self._version: str | None = None
        self._heard = False

    @property
    def objects(self) -> Mapping[Key, T]:
        return MappingProxyType(self._objects)

    @property
    def unparsable(self) -> Mapping[Key, str]:
        """Objects that could not be read, and why."""
        return MappingProxyType(self._unparsable)

    @property
    def is_synced(self) -> bool:
        """Whether the first list has been read: until then an absent object may well exist."""
        return self._synced.is_set()

    async def synced(self) -> None:
        await self._synced.wait()

    def get(self, name: str, namespace: str | None = None) -> T | None:
        return self._objects.get(Key(namespace, name))

    async def run(self) -> NoReturn:
        """Follow for ever. Whatever kube-apiserver answers, the last known state stays and the next try comes.

        A watch that broke is resumed where it was; only when that can't be done everything is listed again.
        """
        delay = _FIRST_DELAY
        while True:
            self._heard = False
            try:
                if self._version is None:
                    self._version = await self._list()
                await self._follow(self._version)
                delay = _FIRST_DELAY
                pause = _FIRST_DELAY  # a server that ends every watch at once is not run over
            except StatusError as error:
                if self._heard:
                    delay = _FIRST_DELAY
                if error.code == 410 or delay >= _LONGEST_DELAY:
                    self._version = None
                if error.code != 410:
                    _log.warning("following %s failed: %s", self._resource.plural, error.message)
                # Spread, so that a thousand agents don't come back in step.
                pause = delay * random.uniform(0.5, 1.0)  # noqa: S311
                delay = min(delay * 2, _LONGEST_DELAY)
            await asyncio.sleep(pause)

    async def _list(self) -> str:
        seen = set()
        version = ""
        async for page in self._client.pages(
            self._resource,
            namespace=self._namespace,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            metadata_only=self._metadata_only,
            limit=self._page,
        ):
            version = page.resource_version
            for item in page.items:
                seen.add(_key(item))
                self._put(item)
        for key in self._versions.keys() - seen:
            self._remove(key)
        self._synced.set()
        return version

    async def _follow(self, version: str) -> None:
        async for event in self._client.watch(
            self._resource,
            resource_version=version,
            namespace=self._namespace,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            metadata_only=self._metadata_only,
        ):
            self._version = event.object["metadata"]["resourceVersion"]
            self._heard = True
            if event.type == "DELETED":
                self._remove(_key(event.object))
            elif event.type != "BOOKMARK":
                self._put(event.object)

    def _put(self, item: Json) -> None:
        key = _key(item)
        version = item["metadata"]["resourceVersion"]
        if self._versions.get(key) == version:
            return
        self._versions[key] = version
        try:
            parsed = self._parse(item)
            if key in self._objects and self._objects[key] == parsed:
                return
            self._objects[key] = parsed
            self._unparsable.pop(key, None)
        except Exception as error:
            self._objects.pop(key, None)
            self._unparsable[key] = str(error)
            surprise = None if isinstance(error, ValueError) else error
            name = "/".join(filter(None, key))
            _log.warning("%s %s can't be read: %s", self._resource.kind, name, error, exc_info=surprise)
        self._changed(key)

    def _remove(self, key: Key) -> None:
        known = self._versions.pop(key, None)
        self._objects.pop(key, None)
        self._unparsable.pop(key, None)
        if known is not None:
            self._changed(key)

    def _changed(self, key: Key) -> None:
        if self._on_change is not None:
            self._on_change(key)


def _key(item: Json) -> Key:
    metadata = item["metadata"]
    return Key(metadata.get("namespace"), metadata["name"])
