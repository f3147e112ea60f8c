"""What Prometheus reads, by its own parser, and that its labels are those of Kubernetes and of bounded number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from apiserver.aggregation.metrics import Metrics, Reported, reported
from apiserver.aggregation.requestinfo import RequestInfo, parse

ROOT = "/apis/library.example.org/v1"
PAGES = Reported("GET", "library.example.org", "v1", "books", "pages", "resource")


@pytest.mark.parametrize(
    ("method", "path", "labels"),
    [
        ("GET", f"{ROOT}/namespaces/n/books/b/pages", PAGES),
        ("HEAD", f"{ROOT}/namespaces/n/books/b/pages/7", PAGES),
        ("DELETE", f"{ROOT}/namespaces/n/books/b/pages/7", PAGES._replace(verb="DELETE")),
        ("GET", f"{ROOT}/watch/namespaces/n/books/b/pages", PAGES._replace(verb="WATCH")),
        ("OPTIONS", f"{ROOT}/namespaces/n/books/b/pages", PAGES._replace(verb="other")),
        ("GET", f"{ROOT}/namespaces/n/books", PAGES._replace(verb="LIST", subresource="", scope="namespace")),
        ("GET", f"{ROOT}/books", PAGES._replace(verb="LIST", subresource="", scope="cluster")),
        ("GET", f"{ROOT}/books?watch=1", PAGES._replace(verb="WATCH", subresource="", scope="cluster")),
        ("POST", f"{ROOT}/namespaces/n/books", PAGES._replace(verb="POST", subresource="")),
        ("GET", "/apis", Reported("GET", subresource="/apis")),
        ("GET", "/healthz", Reported("GET", subresource="/healthz")),
    ],
)
def test_a_request_that_is_served_is_told_as_kubernetes_tells_it(method: str, path: str, labels: Reported) -> None:
    assert reported(method, parse(method, path), is_served=True) == labels


@given(st.text(), st.text(), st.text())
def test_nothing_of_a_request_that_is_not_served_becomes_a_label(method: str, path: str, group: str) -> None:
    info = RequestInfo(path=path, verb="get", is_resource_request=True, api_group=group, resource=path, name=path)

    assert reported(method, info).verb in {"DELETE", "GET", "LIST", "PATCH", "POST", "PUT", "WATCH", "other"}
    assert reported(method, info)[1:] == ("", "", "", "", "")
    assert reported(method)[1:] == ("", "", "", "", "")


def test_names_and_labels_are_those_of_kubernetes() -> None:
    metrics = Metrics()
    with metrics.under_way("GET"), metrics.long_running("GET", PAGES):
        metrics.answered(PAGES, code=200, seconds=0.1, size=10)
        metrics.terminated(PAGES, code=429)
        metrics.aborted(PAGES)
        metrics.authenticated("success", 0.001)
        metrics.authorized("denied", 0.001)
        metrics.token_reviewed("201", 0.01)
        metrics.access_reviewed("<error>", 10.0)
        metrics.lost("handshake")
        shown = metrics.exposition().decode()
    labels = {
        sample.name: set(sample.labels) - {"le"}
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    request = {"verb", "group", "version", "resource", "subresource", "scope"}
    for name, expected in {
        "apiserver_request_total": request | {"dry_run", "component", "code"},
        "apiserver_request_duration_seconds_bucket": request | {"dry_run", "component"},
        "apiserver_response_sizes_bucket": request | {"component"},
        "apiserver_longrunning_requests": request | {"component"},
        "apiserver_current_inflight_requests": {"request_kind"},
        "apiserver_request_terminations_total": request | {"component", "code"},
        "apiserver_request_aborts_total": request,
        "apiserver_tls_handshake_errors_total": set(),
        "authentication_duration_seconds_count": {"result"},
        "authorization_duration_seconds_count": {"result"},
        "apiserver_delegated_authn_request_total": {"code"},
        "apiserver_delegated_authz_request_duration_seconds_bucket": {"code"},
        "process_resident_memory_bytes": set(),
    }.items():
        assert labels[name] == expected


def test_a_long_running_request_is_not_in_flight() -> None:
    metrics = Metrics()

    def counted() -> tuple[float, float]:
        families = text_string_to_metric_families(metrics.exposition().decode())
        values = {
            sample.name + sample.labels.get("request_kind", ""): sample.value for f in families for sample in f.samples
        }
        return values["apiserver_current_inflight_requestsreadOnly"], values.get("apiserver_longrunning_requests", 0)

    with metrics.under_way("GET"):
        assert counted() == (1, 0)
        with metrics.long_running("GET", PAGES):
            assert counted() == (0, 1)
        assert counted() == (1, 0)
    assert counted() == (0, 0)
