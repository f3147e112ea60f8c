"""What a server offers: resources with subresources, and what answers each request for one.

One description serves everything that must agree: dispatch, discovery, OpenAPI, and which names are let through.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from apiserver.aggregation.authentication import User
from apiserver.aggregation.requestinfo import RequestInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One authenticated, authorized request for an endpoint.

    `segments` are the values of its path's variable parts, by name. Each of `warnings` (a line of ASCII) that is there
    when the answer begins is shown to the user by kubectl.
    """

    request: web.Request
    info: RequestInfo
    user: User
    segments: dict[str, str]
    warnings: list[str]


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A variable part of the path after the subresource; `problem` says what is wrong with a value, None if nothing.

    `schema` says it in JSON Schema, for the documentation.
    """

    name: str
    description: str
    problem: Callable[[str], str | None]
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query parameter, for the documentation; the handler reads it."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header of requests or of answers, for the documentation; the handler reads or writes it."""

    name: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Answers one verb on a subresource, with `segments` after it.

    `answers` is the name of the schema of the JSON that it gives, or None when it gives a `content_type` of bytes. A
    `streams` request may last: it counts against the number that each user may have at a time. `successes` and
    `refusals` are the codes of its answers, for the documentation, but for those that any request may get.
    """

    verb: str
    handle: Handler
    description: str
    segments: tuple[Segment, ...] = ()
    queries: tuple[Query, ...] = ()
    headers: tuple[Header, ...] = ()
    answers: str | None = None
    content_type: str = "application/json"
    answer_headers: tuple[Header, ...] = ()
    successes: Mapping[int, str] = field(default_factory=lambda: {200: "OK"})
    refusals: Mapping[int, str] = field(default_factory=dict)
    streams: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Subresource:
    """`kind` is what the subresource answers with, as discovery names it."""

    name: str
    kind: str
    endpoints: tuple[Endpoint, ...]

    @property
    def verbs(self) -> tuple[str, ...]:
        return tuple(sorted({endpoint.verb for endpoint in self.endpoints}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A resource that is served for its subresources alone, and so has no verbs of its own.

    Discovery needs it nevertheless: without the parent, `kubectl auth can-i` does not find the subresource.
    """

    name: str
    singular: str
    kind: str
    subresources: tuple[Subresource, ...]
    namespaced: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A version of an API group."""

    name: str
    version: str
    resources: tuple[Resource, ...]

    @property
    def group_version(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a path leads to: the endpoints of each verb there, and the values of its variable segments."""

    endpoints: dict[str, Endpoint]
    segments: dict[str, str]

    def problem(self) -> str | None:
        """What is wrong with the values, which are refused before anyone is asked whether they may be read."""
        for endpoint in self.endpoints.values():
            for segment in endpoint.segments:
                if (problem := segment.problem(self.segments[segment.name])) is not None:
                    return f"{segment.name}: {problem}"
        return None


def find(groups: Sequence[Group], info: RequestInfo) -> Found | None:
    """What answers at the path of `info`, for whichever verb; None when nothing does."""
    for group in groups:
        if (group.name, group.version) != (info.api_group, info.api_version):
            continue
        for resource in group.resources:
            if resource.name != info.resource or resource.namespaced != bool(info.namespace):
                continue
            for subresource in resource.subresources:
                if subresource.name == info.subresource:
                    return _at(subresource, info.parts[3:])
    return None


def _at(subresource: Subresource, values: Sequence[str]) -> Found | None:
    endpoints = {e.verb: e for e in subresource.endpoints if len(e.segments) == len(values)}
    if not endpoints:
        return None
    names = (segment.name for segment in next(iter(endpoints.values())).segments)
    return Found(endpoints=endpoints, segments=dict(zip(names, values, strict=True)))
