import json

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from apiserver.aggregation.discovery import Discovery, aggregated, resource_list, wants_aggregated
from apiserver.aggregation.document import Document
from apiserver.aggregation.group import Call, Endpoint, Found, Group, Resource, Segment, Subresource, find
from apiserver.aggregation.openapi import OpenAPI, version_2, version_3
from apiserver.aggregation.requestinfo import parse


async def _answer(_: Call) -> web.StreamResponse:
    return web.Response()


PAGE = Segment(name="page", description="page", problem=lambda value: None if value.isdigit() else "no number")
PAGES = Subresource(
    name="pages",
    kind="PageList",
    endpoints=(
        Endpoint(verb="get", handle=_answer, description="list pages", answers="PageList"),
        Endpoint(verb="watch", handle=_answer, description="follow pages", answers="PageList", streams=True),
        Endpoint(verb="get", handle=_answer, description="read a page", segments=(PAGE,), content_type="text/plain"),
        Endpoint(verb="delete", handle=_answer, description="tear a page out", segments=(PAGE,), answers="PageList"),
    ),
)
BOOKS = Group(
    name="library.example.org",
    version="v1",
    resources=(Resource(name="books", singular="book", kind="Book", subresources=(PAGES,)),),
)
SHELVES = Group(
    name="library.example.org",
    version="v2",
    resources=(Resource(name="shelves", singular="shelf", kind="Shelf", subresources=(PAGES,), namespaced=False),),
)
ROOT = "/apis/library.example.org/v1"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList", True),
        ("application/json;as=APIGroupDiscoveryList;v=v2;g=apidiscovery.k8s.io", True),
        ("application/json; g=apidiscovery.k8s.io; v=v2; as=APIGroupDiscoveryList;profile=nopeer", True),
        ("application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList", False),
        (
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,"
            "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json",
            True,
        ),
        ("application/vnd.kubernetes.protobuf;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList", False),
    ],
)
def test_the_aggregated_form_is_given_to_those_who_ask_for_it(accept: str, wanted: bool) -> None:
    assert wants_aggregated(accept) is wanted


def test_the_parent_resource_is_listed_without_verbs() -> None:
    assert resource_list(BOOKS)["resources"] == [
        {"name": "books", "singularName": "book", "namespaced": True, "kind": "Book", "verbs": []},
        {
            "name": "books/pages",
            "singularName": "",
            "namespaced": True,
            "kind": "PageList",
            "verbs": ["delete", "get", "watch"],
        },
    ]


def test_versions_of_a_group_are_discovered_together() -> None:
    (group,) = aggregated([BOOKS, SHELVES])["items"]

    assert group["metadata"] == {"name": "library.example.org"}
    assert [version["version"] for version in group["versions"]] == ["v1", "v2"]
    (books,) = group["versions"][0]["resources"]
    assert (books["resource"], books["scope"], books["verbs"]) == ("books", "Namespaced", [])
    assert books["subresources"] == [
        {
            "subresource": "pages",
            "responseKind": {"group": "library.example.org", "version": "v1", "kind": "PageList"},
            "verbs": ["delete", "get", "watch"],
        }
    ]
    assert group["versions"][1]["resources"][0]["scope"] == "Cluster"


def test_every_legacy_path_has_its_document() -> None:
    discovery = Discovery([BOOKS, SHELVES])

    assert discovery.paths == (
        "/apis",
        "/apis/library.example.org",
        "/apis/library.example.org/v1",
        "/apis/library.example.org/v2",
    )
    document = discovery.document("/apis/library.example.org", "")
    assert document is not None
    answer = document.respond(make_mocked_request("GET", "/"))
    assert isinstance(answer.body, bytes)
    assert json.loads(answer.body)["preferredVersion"] == {"groupVersion": "library.example.org/v1", "version": "v1"}
    assert discovery.document("/apis/other", "") is None


@pytest.mark.parametrize(
    ("known", "status"),
    [("", 200), ('"{}"', 304), ('W/"{}"', 304), ('"other", "{}"', 304), ('"other"', 200)],
)
def test_a_document_that_the_client_has_is_not_sent_again(known: str, status: int) -> None:
    document = Document({"kind": "Thing"})

    answer = document.respond(make_mocked_request("GET", "/", headers={"If-None-Match": known.format(document.hash)}))

    assert answer.status == status
    assert answer.headers["ETag"] == f'"{document.hash}"'


def test_openapi_describes_each_endpoint_where_it_is_served() -> None:
    document = version_3(BOOKS, {"PageList": {"type": "object"}}, {"title": "library", "version": "v1"})

    base = f"{ROOT}/namespaces/{{namespace}}/books/{{name}}/pages"
    watch = f"{ROOT}/watch/namespaces/{{namespace}}/books/{{name}}/pages"
    assert {path: set(methods) for path, methods in document["paths"].items()} == {
        base: {"get"},
        watch: {"get"},
        f"{base}/{{page}}": {"get", "delete"},
    }
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert sorted(operation["operationId"] for operation in operations) == [
        "deleteNamespacedBookPagesPage",
        "readNamespacedBookPages",
        "readNamespacedBookPagesPage",
        "watchNamespacedBookPages",
    ]
    read = document["paths"][f"{base}/{{page}}"]["get"]
    assert [parameter["name"] for parameter in read["parameters"]] == ["name", "namespace", "page"]
    assert read["responses"]["200"]["content"] == {"text/plain": {"schema": {"type": "string", "format": "binary"}}}


@pytest.mark.parametrize(
    "document",
    [
        version_2([BOOKS, SHELVES], {"PageList": {"type": "object"}}, {"title": "library", "version": "v1"}),
        version_3(BOOKS, {"PageList": {"type": "object"}}, {"title": "library", "version": "v1"}),
    ],
    ids=["2.0", "3.0"],
)
def test_every_reference_in_openapi_leads_somewhere(document: dict[str, object]) -> None:
    references: set[str] = set()

    def search(part: object) -> None:
        if isinstance(part, dict):
            references.update(value for key, value in part.items() if key == "$ref")
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            search(inner)

    search(document)
    assert references
    for reference in references:
        target: object = document
        for key in reference.removeprefix("#/").split("/"):
            assert isinstance(target, dict)
            target = target[key]
        assert isinstance(target, dict)
        assert target["type"] == "object"


def test_the_index_of_openapi_names_each_version_by_its_hash() -> None:
    openapi = OpenAPI([BOOKS, SHELVES], {"PageList": {"type": "object"}}, title="library", version="v1")

    index, document = openapi.document("/openapi/v3"), openapi.document(f"/openapi/v3{ROOT}")
    assert index is not None
    assert document is not None
    body = index.respond(make_mocked_request("GET", "/")).body
    assert isinstance(body, bytes)
    paths = json.loads(body)["paths"]
    assert paths["apis/library.example.org/v1"] == {"serverRelativeURL": f"/openapi/v3{ROOT}?hash={document.hash}"}
    assert paths.keys() == {"apis/library.example.org/v1", "apis/library.example.org/v2"}


@pytest.mark.parametrize(
    ("target", "verbs", "segments"),
    [
        (f"{ROOT}/namespaces/n/books/b/pages", {"get", "watch"}, {}),
        (f"{ROOT}/namespaces/n/books/b/pages/12", {"get", "delete"}, {"page": "12"}),
        (f"{ROOT}/watch/namespaces/n/books/b/pages", {"get", "watch"}, {}),
        ("/apis/library.example.org/v2/shelves/s/pages", {"get", "watch"}, {}),
    ],
)
def test_a_path_leads_to_the_endpoints_of_its_depth(target: str, verbs: set[str], segments: dict[str, str]) -> None:
    found = find([BOOKS, SHELVES], parse("GET", target))

    assert found is not None
    assert set(found.endpoints) == verbs
    assert found.segments == segments
    assert found.problem() is None


@pytest.mark.parametrize(
    "target",
    [
        f"{ROOT}/namespaces/n/books",
        f"{ROOT}/namespaces/n/books/b",
        f"{ROOT}/namespaces/n/books/b/cover",
        f"{ROOT}/namespaces/n/books/b/pages/1/2",
        f"{ROOT}/namespaces/n/pens/b/pages",
        f"{ROOT}/books/b/pages",
        "/apis/library.example.org/v3/namespaces/n/books/b/pages",
        "/apis/other.example.org/v1/namespaces/n/books/b/pages",
        "/apis/library.example.org/v2/namespaces/n/shelves/s/pages",
        "/api/v1/namespaces/n/books/b/pages",
        "/apis",
    ],
)
def test_any_other_path_leads_nowhere(target: str) -> None:
    assert find([BOOKS, SHELVES], parse("GET", target)) is None


def test_a_segment_that_is_wrong_is_named() -> None:
    found = find([BOOKS], parse("GET", f"{ROOT}/namespaces/n/books/b/pages/cover"))

    assert isinstance(found, Found)
    assert found.problem() == "page: no number"
