"""The groups' OpenAPI documents, versions 2.0 and 3.0.

kube-apiserver merges them into its own for `kubectl explain`, completion and validation. Both must be there when it
first asks: it remembers a version that was missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apiserver.aggregation.document import Document
from apiserver.aggregation.group import Endpoint, Group, Header, Resource, Subresource

Json = dict[str, Any]
Schemas = Mapping[str, Json]
"""Structural schemas (so without references) by the name of the kind that they describe."""

_METHODS = {"get": "get", "watch": "get", "delete": "delete"}
_ACTIONS = {"get": "read", "watch": "watch", "delete": "delete"}
# What a request may meet whatever it asks for.
_REFUSALS = {
    400: "Bad Request: a part of the path or a parameter can't be read",
    401: "Unauthorized",
    403: "Forbidden",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_SHORT_REFUSALS = {504: "Gateway Timeout"}
_STREAM_REFUSALS = {429: "Too Many Requests: the user has as many such requests under way as one may have"}
_STATUS = "Status"
_STATUS_SCHEMA: Json = {
    "type": "object",
    "description": "why a request failed, as metav1.Status says it",
    "required": ["kind", "apiVersion", "status", "message", "reason", "code"],
    "properties": {
        "kind": {"type": "string", "enum": ["Status"]},
        "apiVersion": {"type": "string", "enum": ["v1"]},
        "metadata": {"type": "object"},
        "status": {"type": "string", "enum": ["Failure"]},
        "message": {"type": "string", "description": "for a person"},
        "reason": {"type": "string", "description": "for a program, one of Kubernetes' own words"},
        "code": {"type": "integer", "format": "int32", "description": "that of the HTTP answer"},
        "details": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "group": {"type": "string"},
                "kind": {"type": "string"},
                "retryAfterSeconds": {"type": "integer", "format": "int32"},
            },
        },
    },
}
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
            paths.setdefault(operation.path, {})[operation.method] = {
                **operation.described(),
                "schemes": ["https"],
                "produces": sorted({operation.endpoint.content_type, "application/json"}),
                "parameters": [{**place, **schema} for place, schema in operation.parameters()],
                "responses": {str(answer.code): _in_version_2(answer) for answer in operation.answers(_V2_REFERENCE)},
            }
    return {"swagger": "2.0", "info": dict(info), "paths": paths, "definitions": definitions}


def version_3(group: Group, schemas: Schemas, info: Mapping[str, str]) -> Json:
    """OpenAPI 3.0.0, a document for each group and version."""
    paths: dict[str, Json] = {}
    for operation in _operations(group):
        paths.setdefault(operation.path, {})[operation.method] = {
            **operation.described(),
            "parameters": [{**place, "schema": dict(schema)} for place, schema in operation.parameters()],
            "responses": {str(answer.code): _in_version_3(answer) for answer in operation.answers(_V3_REFERENCE)},
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

    def parameters(self) -> Iterator[tuple[Json, Mapping[str, Any]]]:
        """Each parameter's place and description, and its schema, which the two versions write in different places."""
        variables: list[tuple[str, str, Mapping[str, Any]]] = [
            ("name", f"name of the {self.resource.kind}", {"type": "string"})
        ]
        if self.resource.namespaced:
            variables.append(
                ("namespace", "object name and auth scope, such as for teams and projects", {"type": "string"})
            )
        variables += ((segment.name, segment.description, segment.schema) for segment in self.endpoint.segments)
        for name, description, schema in variables:
            yield {"name": name, "in": "path", "required": True, "description": description}, schema
        for query in self.endpoint.queries:
            yield {"name": query.name, "in": "query", "description": query.description}, query.schema
        for header in self.endpoint.headers:
            yield {"name": header.name, "in": "header", "description": header.description}, {"type": "string"}

    def answers(self, reference: str) -> Iterator["_Answer"]:
        """What may come back; `reference` is where the version of OpenAPI has its schemas."""
        endpoint, prefix = self.endpoint, reference + _prefix(self.group)
        content: Json = {"type": "string", "format": "binary"}
        if endpoint.answers is not None:
            content = {"$ref": prefix + endpoint.answers}
        for code, description in endpoint.successes.items():
            if code == 304:
                yield _Answer(code, description, headers=endpoint.answer_headers)
            else:
                yield _Answer(code, description, endpoint.content_type, content, endpoint.answer_headers)
        refusals = {**_REFUSALS, **(_STREAM_REFUSALS if endpoint.streams else _SHORT_REFUSALS), **endpoint.refusals}
        for code, description in sorted(refusals.items()):
            yield _Answer(code, description, "application/json", {"$ref": prefix + _STATUS})


@dataclass(frozen=True, slots=True)
class _Answer:
    code: int
    description: str
    content_type: str = ""
    schema: Json | None = None
    headers: tuple[Header, ...] = ()


def _in_version_2(answer: _Answer) -> Json:
    described: Json = {"description": answer.description}
    if answer.schema is not None:
        described["schema"] = answer.schema
    if answer.headers:
        described["headers"] = {
            header.name: {"description": header.description, "type": "string"} for header in answer.headers
        }
    return described


def _in_version_3(answer: _Answer) -> Json:
    described: Json = {"description": answer.description}
    if answer.schema is not None:
        described["content"] = {answer.content_type: {"schema": answer.schema}}
    if answer.headers:
        described["headers"] = {
            header.name: {"description": header.description, "schema": {"type": "string"}} for header in answer.headers
        }
    return described


def _operations(group: Group) -> Iterator[_Operation]:
    for resource in group.resources:
        for subresource in resource.subresources:
            for endpoint in subresource.endpoints:
                yield _Operation(group, resource, subresource, endpoint)


def _definitions(group: Group, schemas: Schemas) -> Json:
    definitions = {
        _prefix(group) + kind: {
            **schema,
            "x-kubernetes-group-version-kind": [{"group": group.name, "version": group.version, "kind": kind}],
        }
        for kind, schema in schemas.items()
    }
    return {**definitions, _prefix(group) + _STATUS: _STATUS_SCHEMA}


def _prefix(group: Group) -> str:
    """Kubernetes qualifies the names of schemas by the group, its most significant part first."""
    return ".".join([*reversed(group.name.split(".")), group.version, ""])
