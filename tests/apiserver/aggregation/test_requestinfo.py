"""The table follows the cases of `k8s.io/apiserver/pkg/endpoints/request/requestinfo_test.go` and adds our own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiserver.aggregation.requestinfo import MethodError, PathError, RequestInfo, parse

G = "/apis/subresources.kubepcap.io/v1"

# method, target -> verb, group, version, namespace, resource, subresource, name, parts
RESOURCES = [
    ("GET", "/api/v1/namespaces", "list", "", "v1", "", "namespaces", "", "", "namespaces"),
    ("GET", "/api/v1/namespaces/other", "get", "", "v1", "other", "namespaces", "", "other", "namespaces other"),
    ("GET", "/api/v1/namespaces/other/pods", "list", "", "v1", "other", "pods", "", "", "pods"),
    ("GET", "/api/v1/namespaces/other/pods/", "list", "", "v1", "other", "pods", "", "", "pods"),
    ("GET", "/api/v1/namespaces/other/pods/foo", "get", "", "v1", "other", "pods", "", "foo", "pods foo"),
    ("HEAD", "/api/v1/namespaces/other/pods/foo", "get", "", "v1", "other", "pods", "", "foo", "pods foo"),
    ("GET", "/api/v1/pods", "list", "", "v1", "", "pods", "", "", "pods"),
    ("HEAD", "/api/v1/pods", "list", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/nodes/n1", "get", "", "v1", "", "nodes", "", "n1", "nodes n1"),
    ("GET", "/api/v1/proxy/namespaces/other/pods/foo", "proxy", "", "v1", "other", "pods", "", "foo", "pods foo"),
    (
        "GET",
        "/api/v1/proxy/namespaces/other/pods/foo/subpath/not/a/subresource",
        *("proxy", "", "v1", "other", "pods", "", "foo", "pods foo subpath not a subresource"),
    ),
    ("DELETE", "/api/v1/proxy/pods", "proxy", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/watch/pods", "watch", "", "v1", "", "pods", "", "", "pods"),
    ("HEAD", "/api/v1/watch/pods", "watch", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/pods?watch=true", "watch", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/pods?watch=false", "list", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/pods?watch=FALSE", "list", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/pods?watch=", "watch", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/pods?watch=maybe", "watch", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/pods?watch=0&watch=1", "list", "", "v1", "", "pods", "", "", "pods"),
    ("GET", "/api/v1/watch/namespaces/other/pods", "watch", "", "v1", "other", "pods", "", "", "pods"),
    ("GET", "/api/v1/namespaces/other/pods?watch=1", "watch", "", "v1", "other", "pods", "", "", "pods"),
    ("GET", "/api/v1/namespaces/other/pods?watch=0", "list", "", "v1", "other", "pods", "", "", "pods"),
    ("GET", "/api/v1/namespaces/o/pods/foo?watch=true", "get", "", "v1", "o", "pods", "", "foo", "pods foo"),
    (
        "GET",
        "/api/v1/namespaces/other/pods/foo/status",
        *("get", "", "v1", "other", "pods", "status", "foo", "pods foo status"),
    ),
    (
        "GET",
        "/api/v1/namespaces/other/pods/foo/proxy/subpath",
        *("get", "", "v1", "other", "pods", "proxy", "foo", "pods foo proxy subpath"),
    ),
    (
        "PUT",
        "/api/v1/namespaces/other/finalize",
        *("update", "", "v1", "other", "namespaces", "finalize", "other", "namespaces other finalize"),
    ),
    (
        "PUT",
        "/api/v1/namespaces/other/status",
        *("update", "", "v1", "other", "namespaces", "status", "other", "namespaces other status"),
    ),
    ("PATCH", "/api/v1/namespaces/other/pods/foo", "patch", "", "v1", "other", "pods", "", "foo", "pods foo"),
    ("PUT", "/api/v1/namespaces/other/pods/foo", "update", "", "v1", "other", "pods", "", "foo", "pods foo"),
    ("DELETE", "/api/v1/namespaces/other/pods/foo", "delete", "", "v1", "other", "pods", "", "foo", "pods foo"),
    ("POST", "/api/v1/namespaces/other/pods", "create", "", "v1", "other", "pods", "", "", "pods"),
    ("OPTIONS", "/api/v1/namespaces/other/pods", "", "", "v1", "other", "pods", "", "", "pods"),
    ("DELETE", "/api/v1/nodes", "deletecollection", "", "v1", "", "nodes", "", "", "nodes"),
    ("DELETE", "/api/v1/namespaces", "deletecollection", "", "v1", "", "namespaces", "", "", "namespaces"),
    ("DELETE", "/api/v1/namespaces/other/pods", "deletecollection", "", "v1", "other", "pods", "", "", "pods"),
    ("DELETE", "/apis/ext/v1/namespaces/o/pods", "deletecollection", "ext", "v1", "o", "pods", "", "", "pods"),
    ("POST", "/apis/ext/v1beta3/namespaces/o/pods", "create", "ext", "v1beta3", "o", "pods", "", "", "pods"),
    ("GET", "/apis/batch/v1/job", "list", "batch", "v1", "", "job", "", "", "job"),
    ("GET", "/apis/batch/v1/job/foo/scale", "get", "batch", "v1", "", "job", "scale", "foo", "job foo scale"),
    (
        "GET",
        f"{G}/namespaces/dev/packetcaptures/c1/files",
        *("get", "subresources.kubepcap.io", "v1", "dev", "packetcaptures", "files", "c1", "packetcaptures c1 files"),
    ),
    (
        "GET",
        f"{G}/namespaces/dev/packetcaptures/c1/files?watch=true&fieldSelector=metadata.name%3Dother",
        *("get", "subresources.kubepcap.io", "v1", "dev", "packetcaptures", "files", "c1", "packetcaptures c1 files"),
    ),
    (
        "GET",
        f"{G}/namespaces/dev/packetcaptures/c1/files/n1/a_b.pcap",
        *("get", "subresources.kubepcap.io", "v1", "dev", "packetcaptures", "files", "c1"),
        "packetcaptures c1 files n1 a_b.pcap",
    ),
    (
        "GET",
        f"{G}/watch/namespaces/dev/packetcaptures/c1/files",
        *("watch", "subresources.kubepcap.io", "v1", "dev", "packetcaptures", "files", "c1"),
        "packetcaptures c1 files",
    ),
    # A resource, a name or a namespace that is called like a keyword.
    ("GET", "/apis/g/v1/namespaces/watch/pods/proxy", "get", "g", "v1", "watch", "pods", "", "proxy", "pods proxy"),
    ("GET", "/apis/g/v1/watch/watch/x", "watch", "g", "v1", "", "watch", "", "x", "watch x"),
    (
        "GET",
        "/apis/g/v1/namespaces/namespaces/namespaces/namespaces",
        *("get", "g", "v1", "namespaces", "namespaces", "", "namespaces", "namespaces namespaces"),
    ),
    ("GET", "/api/v1/watch/namespaces", "watch", "", "v1", "", "namespaces", "", "", "namespaces"),
]

NON_RESOURCES = [
    ("GET", "/"),
    ("GET", "/api"),
    ("GET", "/api/"),
    ("GET", "/api/version"),
    ("GET", "/api/version/"),
    ("GET", "/apis"),
    ("GET", "/apis/batch"),
    ("GET", "/apis/extensions/v1beta1"),
    ("GET", "/apis/extensions/v1beta1/"),
    ("GET", "/apis/version/resource"),
    ("GET", "/badprefix/version/resource"),
    ("GET", "/not-api/version/resource"),
    ("POST", "/healthz"),
    ("GET", "/openapi/v3/apis/g/v1?hash=ABC"),
    ("HEAD", "/readyz"),
]

SELECTORS = [
    # query, name, verb, field selector, label selector
    ("", "", "list", "", ""),
    ("fieldSelector=metadata.name=name1", "name1", "list", "metadata.name=name1", ""),
    ("fieldSelector=metadata.name%3D%3Dname1", "name1", "list", "metadata.name==name1", ""),
    ("fieldSelector=metadata.name!=name1", "", "list", "metadata.name!=name1", ""),
    ("watch=true&fieldSelector=metadata.name=name1", "name1", "watch", "metadata.name=name1", ""),
    ("fieldSelector=foo=bar&labelSelector=baz=qux", "", "list", "foo=bar", "baz=qux"),
    ("fieldSelector=metadata.name=name1,foo", "", "list", "metadata.name=name1,foo", ""),
    ("fieldSelector=metadata.name=name1,foo&watch=true", "", "watch", "metadata.name=name1,foo", ""),
    ("fieldSelector=metadata.name=name1,foo&watch=false", "", "list", "metadata.name=name1,foo", ""),
    ("fieldSelector=a=b,metadata.name=name1", "name1", "list", "a=b,metadata.name=name1", ""),
    (
        "fieldSelector=metadata.name=foo&fieldSelector=metadata.name=bar&labelSelector=foo=bar&labelSelector=foo=baz",
        *("foo", "list", "metadata.name=foo", "foo=bar"),
    ),
    ("fieldSelector=metadata.name=..", "", "list", "metadata.name=..", ""),
    ("fieldSelector=metadata.name=a/b", "", "list", "metadata.name=a/b", ""),
    ("fieldSelector=metadata.name=name1&limit=ten", "", "list", "metadata.name=name1", ""),
    ("fieldSelector=metadata.name=name1&limit=10", "name1", "list", "metadata.name=name1", ""),
    ("fieldSelector=metadata.name=name1&limit=", "", "list", "metadata.name=name1", ""),
    (f"fieldSelector=metadata.name=name1&limit={'9' * 5000}", "", "list", "metadata.name=name1", ""),
    ("fieldSelector=metadata.name=name1&limit=9223372036854775808", "", "list", "metadata.name=name1", ""),
    ("fieldSelector=metadata.name=b,metadata.name=a", "a", "list", "metadata.name=b,metadata.name=a", ""),
    (r"fieldSelector=a!b=c,metadata.name=x\\,y=z", "x\\", "list", r"a!b=c,metadata.name=x\\,y=z", ""),
    ("fieldSelector=metadata.name=a&labelSelector=b%20in%20(c,d),!e", "a", "list", "metadata.name=a", "b in (c,d),!e"),
]

REFUSED = [
    "",
    "*",
    "apis",
    "http://host/apis",
    "//",
    "//apis",
    "/apis//g/v1",
    "/apis/g/v1//",
    "/apis/g/v1/namespaces//pods",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/../../other/files",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/..",
    "/apis/g/v1/namespaces/dev/packetcaptures/./files",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/%2e%2e/x",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/%2E./x",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1%2Ffiles",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/..%2f..%2fother",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/%252e%252e/x",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/..%5cother",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/..\\other",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/..;/other",
    "/apis/g/v1/namespaces/dev/packetcaptures/%63%31/files",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/a b",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/a\x00b",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/é",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/\udc2e\udc2e",
    "/apis/g/v1/namespaces/dev/packetcaptures/c1/files#fragment",
    "/apis/g/v1/watch",
    "/apis/g/v1/proxy",
    "/apis/g/v1/pods?a=%zz",
    "/apis/g/v1/pods?a=%",
    "/apis/g/v1/pods?a=b;c=d",
    "/apis/g/v1/pods?a=%ff",
    "/apis/g/v1/pods?a=é",
    "/apis/g/v1/pods?watch=fal%C5%BFe",
    "/apis/g/v1/pods?fieldSelector=metadata.name=a&labelSelector=b>1",
]


@pytest.mark.parametrize(
    ("method", "target", "verb", "group", "version", "namespace", "resource", "subresource", "name", "parts"),
    RESOURCES,
    ids=[f"{method} {target}" for method, target, *_ in RESOURCES],
)
def test_a_resource_path_is_read_as_kubernetes_reads_it(
    method: str,
    target: str,
    verb: str,
    group: str,
    version: str,
    namespace: str,
    resource: str,
    subresource: str,
    name: str,
    parts: str,
) -> None:
    assert parse(method, target) == RequestInfo(
        path=target.partition("?")[0],
        verb=verb,
        is_resource_request=True,
        api_prefix="apis" if group else "api",
        api_group=group,
        api_version=version,
        namespace=namespace,
        resource=resource,
        subresource=subresource,
        name=name,
        parts=tuple(parts.split()),
    )


@pytest.mark.parametrize(("method", "target"), NON_RESOURCES)
def test_a_path_without_a_resource_keeps_its_method_as_verb(method: str, target: str) -> None:
    info = parse(method, target)

    assert not info.is_resource_request
    assert (info.verb, info.path) == (method.lower(), target.partition("?")[0])


@pytest.mark.parametrize(("query", "name", "verb", "field_selector", "label_selector"), SELECTORS)
def test_selectors_of_a_list_are_read_as_kubernetes_reads_them(
    query: str, name: str, verb: str, field_selector: str, label_selector: str
) -> None:
    info = parse("GET", f"/apis/group/version/resource?{query}")

    assert (info.name, info.verb, info.field_selector, info.label_selector) == (
        name,
        verb,
        field_selector,
        label_selector,
    )


@pytest.mark.parametrize(
    ("method", "target", "verb", "name"),
    [
        ("GET", "/apis/group/version/resource/name?fieldSelector=foo=bar&labelSelector=foo=bar", "get", "name"),
        ("GET", "/apis/group/version/watch/resource?fieldSelector=metadata.name=foo", "watch", ""),
        ("GET", "/apis/group/version/watch/resource/name?labelSelector=foo=bar", "watch", "name"),
    ],
)
def test_selectors_mean_nothing_where_kubernetes_ignores_them(method: str, target: str, verb: str, name: str) -> None:
    info = parse(method, target)

    assert (info.verb, info.name, info.field_selector, info.label_selector) == (verb, name, "", "")


def test_a_deletion_of_many_has_selectors() -> None:
    info = parse("DELETE", "/apis/group/version/resource?fieldSelector=foo=bar&labelSelector=baz=qux")

    assert (info.verb, info.field_selector, info.label_selector) == ("deletecollection", "foo=bar", "baz=qux")


@pytest.mark.parametrize("target", REFUSED)
def test_a_path_that_could_be_read_in_two_ways_is_refused(target: str) -> None:
    with pytest.raises(PathError):
        parse("GET", target)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_a_watch_is_read_only(method: str) -> None:
    with pytest.raises(MethodError, match="use GET"):
        parse(method, f"{G}/watch/namespaces/dev/packetcaptures/c1/files")


@given(st.text(max_size=200), st.sampled_from(["GET", "DELETE", "BREW"]))
def test_any_target_is_read_or_refused(target: str, method: str) -> None:
    try:
        info = parse(method, target)
    except (PathError, MethodError):
        return
    assert "%" not in info.path
    assert not {".", ".."} & set(info.path.split("/"))


@given(st.lists(st.sampled_from([".", "..", "", "%2e", "a", "namespaces", "watch", "apis"]), max_size=8))
def test_what_is_read_is_what_the_path_spells(segments: list[str]) -> None:
    path = "/" + "/".join(segments)
    try:
        info = parse("GET", path)
    except (PathError, MethodError):
        return
    if info.is_resource_request:
        assert path.rstrip("/").endswith("/".join(info.parts))
