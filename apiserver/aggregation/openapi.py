"""The groups' OpenAPI documents, versions 2.0 and 3.0.

kube-apiserver merges them into its own for `kubectl explain`, completion and validation. Both must be there when it
first asks: it remembers a version that was missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apiserver.aggregation.document import Document
from apiserver.aggregation.group import Endpoint, Group, Resource, Subresource

Json = dict[str, Any]
Schemas = Mapping[str, Json]
"""Structural schemas (so without references) by the name of the kind that they describe."""

_METHODS = {"get": "get", "watch": "get", "delete": "delete"}
_ACTIONS = {"get": "read", "watch": "watch", "delete": "delete"}
_REFUSALS = {"401": {"description": "Unauthorized"}}
_V2_REFERENCE = "#/definitions/"
_V3_REFERENCE = "#/components/schemas/"


class OpenAPI:
    """The documents of all groups, by path."""

    def __init__(self, groups: Sequence[Group], schemas: Schemas, *, title: str, version: str) -> None:
        info = {"title": title, "version": version}
        self._documents = {"/openapi/v2": Document(version_2(groups, schemas, info))}
        index = {}
        for group in groups:
            path = f"apis/{group.group_version}"
            document = Document(version_3(group, schemas, info))
            self._documents[f"/openapi/v3/{path}"] = document
            index[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={document.hash}"}
        self._documents["/openapi/v3"] = Document({"paths": index})

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._documents)

    def document(self, path: str) -> Document | None:
        """What to answer to a GET of `path`."""
        return self._documents.get(path)


def version_2(groups: Sequence[Group], schemas: Schemas, info: Mapping[str, str]) -> Json:
    """OpenAPI 2.0, everything in one document."""
    paths: dict[str, Json] = {}
    definitions: Json = {}
    for group in groups:
        definitions |= _definitions(group, schemas)
        for operation in _operations(group):
            schema = _answer(operation.endpoint, group, _V2_REFERENCE)
            paths.setdefault(operation.path, {})[operation.method] = {
                **operation.described(),
                "schemes": ["https"],
                "produces": [operation.endpoint.content_type],
                "parameters": [{**place, "type": kind} for place, kind in operation.parameters()],
                "responses": {"200": {"description": "OK", "schema": schema}, **_REFUSALS},
            }
    return {"swagger": "2.0", "info": dict(info), "paths": paths, "definitions": definitions}


def version_3(group: Group, schemas: Schemas, info: Mapping[str, str]) -> Json:
    """OpenAPI 3.0.0, a document for each group and version."""
    paths: dict[str, Json] = {}
    for operation in _operations(group):
        schema = _answer(operation.endpoint, group, _V3_REFERENCE)
        content = {operation.endpoint.content_type: {"schema": schema}}
        paths.setdefault(operation.path, {})[operation.method] = {
            **operation.described(),
            "parameters": [{**place, "schema": {"type": kind}} for place, kind in operation.parameters()],
            "responses": {"200": {"description": "OK", "content": content}, **_REFUSALS},
        }
    components = {"schemas": _definitions(group, schemas)}
    return {"openapi": "3.0.0", "info": dict(info), "paths": paths, "components": components}


@dataclass(frozen=True, slots=True)
class _Operation:
    group: Group
    resource: Resource
    subresource: Subresource
    endpoint: Endpoint

    @property
    def path(self) -> str:
        parts = ["", "apis", self.group.name, self.group.version]
        if self.endpoint.verb == "watch":
            parts.append("watch")
        if self.resource.namespaced:
            parts += ["namespaces", "{namespace}"]
        parts += [self.resource.name, "{name}", self.subresource.name]
        return "/".join([*parts, *(f"{{{segment.name}}}" for segment in self.endpoint.segments)])

    @property
    def method(self) -> str:
        return _METHODS[self.endpoint.verb]

    def described(self) -> Json:
        group, version = self.group.name, self.group.version
        words = [
            *(["namespaced"] if self.resource.namespaced else []),
            self.resource.kind,
            self.subresource.name,
            *(segment.name for segment in self.endpoint.segments),
        ]
        name = "".join(word[0].upper() + word[1:] for word in words)
        return {
            "description": self.endpoint.description,
            "operationId": _ACTIONS[self.endpoint.verb] + name,
            "tags": [f"{group.replace('.', '_')}_{version}"],
            "x-kubernetes-action": self.endpoint.verb,
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": self.subresource.kind},
        }

    def parameters(self) -> Iterator[tuple[Json, str]]:
        """Each parameter's place and description, and its type, which the two versions write in different places."""
        variables = [("name", f"name of the {self.resource.kind}")]
        if self.resource.namespaced:
            variables.append(("namespace", "object name and auth scope, such as for teams and projects"))
        variables += ((segment.name, segment.description) for segment in self.endpoint.segments)
        for name, description in variables:
            yield {"name": name, "in": "path", "required": True, "description": description}, "string"
        for query in self.endpoint.queries:
            yield {"name": query.name, "in": "query", "description": query.description}, query.type


def _operations(group: Group) -> Iterator[_Operation]:
    for resource in group.resources:
        for subresource in resource.subresources:
            for endpoint in subresource.endpoints:
                yield _Operation(group, resource, subresource, endpoint)


def _definitions(group: Group, schemas: Schemas) -> Json:
    return {
        _prefix(group) + kind: {
            **schema,
            "x-kubernetes-group-version-kind": [{"group": group.name, "version": group.version, "kind": kind}],
        }
        for kind, schema in schemas.items()
    }


def _answer(endpoint: Endpoint, group: Group, reference: str) -> Json:
    if endpoint.answers is None:
        return {"type": "string", "format": "binary"}
    return {"$ref": reference + _prefix(group) + endpoint.answers}


def _prefix(group: Group) -> str:
    """Kubernetes qualifies the names of schemas by the group, its most significant part first."""
    return ".".join([*reversed(group.name.split(".")), group.version, ""])
