"""Which groups, versions and resources there are, in the two forms in which clients ask.

kube-apiserver asks for the aggregated form at `/apis` and merges it into its own; without it, and in older clients, the
legacy documents of each group and version count.
"""

from collections.abc import Sequence
from typing import Any

from apiserver.aggregation.document import Document
from apiserver.aggregation.group import Group, Resource

_AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
_AGGREGATED_PARAMETERS = {"g": "apidiscovery.k8s.io", "v": "v2", "as": "APIGroupDiscoveryList"}


class Discovery:
    """The documents of all groups, by path."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._aggregated = Document(aggregated(groups), content_type=_AGGREGATED)
        self._legacy = {"/apis": Document({"kind": "APIGroupList", "apiVersion": "v1", "groups": _by_name(groups)})}
        for api_group in _by_name(groups):
            document = {"kind": "APIGroup", "apiVersion": "v1", **api_group}
            self._legacy[f"/apis/{api_group['name']}"] = Document(document)
        for group in groups:
            self._legacy[f"/apis/{group.group_version}"] = Document(resource_list(group))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._legacy)

    def document(self, path: str, accept: str) -> Document | None:
        """What to answer to a GET of `path` with that Accept header."""
        if path == "/apis" and wants_aggregated(accept):
            return self._aggregated
        return self._legacy.get(path)


def wants_aggregated(accept: str) -> bool:
    """Whether an Accept header asks for the aggregated form in the version that is spoken here."""
    for media_range in accept.split(","):
        media_type, *parameters = (part.strip() for part in media_range.split(";"))
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        if media_type == "application/json" and given.items() >= _AGGREGATED_PARAMETERS.items():
            return True
    return False


def aggregated(groups: Sequence[Group]) -> dict[str, Any]:
    """`apidiscovery.k8s.io/v2` `APIGroupDiscoveryList`."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        resources = [_resource_discovery(group, resource) for resource in group.resources]
        version = {"version": group.version, "resources": resources, "freshness": "Current"}
        versions.setdefault(group.name, []).append(version)
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": [{"metadata": {"name": name}, "versions": listed} for name, listed in versions.items()],
    }


def resource_list(group: Group) -> dict[str, Any]:
    """The legacy `APIResourceList` of a group and version."""
    resources = []
    for resource in group.resources:
        resources.append(_api_resource(resource.name, resource.singular, resource.kind, resource.namespaced, ()))
        for subresource in resource.subresources:
            name = f"{resource.name}/{subresource.name}"
            resources.append(_api_resource(name, "", subresource.kind, resource.namespaced, subresource.verbs))
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group.group_version,
        "resources": resources,
    }


def _api_resource(name: str, singular: str, kind: str, namespaced: bool, verbs: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "singularName": singular, "namespaced": namespaced, "kind": kind, "verbs": list(verbs)}


def _resource_discovery(group: Group, resource: Resource) -> dict[str, Any]:
    def kind(name: str) -> dict[str, str]:
        return {"group": group.name, "version": group.version, "kind": name}

    return {
        "resource": resource.name,
        "responseKind": kind(resource.kind),
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "verbs": [],
        "subresources": [
            {
                "subresource": subresource.name,
                "responseKind": kind(subresource.kind),
                "verbs": list(subresource.verbs),
            }
            for subresource in resource.subresources
        ],
    }


def _by_name(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The legacy form of each group; the version that was registered first is the preferred one."""
    versions: dict[str, list[dict[str, str]]] = {}
    for group in groups:
        version = {"groupVersion": group.group_version, "version": group.version}
        versions.setdefault(group.name, []).append(version)
    return [{"name": name, "versions": listed, "preferredVersion": listed[0]} for name, listed in versions.items()]
