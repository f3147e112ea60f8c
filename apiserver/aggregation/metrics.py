"""What the server shows to Prometheus, in the names and labels of `k8s.io/apiserver` where it has them.

So the dashboards and alerts that know a kube-apiserver know this server. Labels come from what is served, never from a
request alone: no name, no user and no path that leads nowhere becomes one, so their number has a bound.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from apiserver.aggregation.requestinfo import RequestInfo
from kube.connections import Loss

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Result = Literal["success", "failure", "error", "allowed", "denied"]

_COMPONENT: Final = "apiserver"
_REPORTED: Final = ("verb", "group", "version", "resource", "subresource", "scope")
_DURATIONS: Final = (
    *(0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0),
    *(3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0),
)
_SIZES: Final = tuple(10.0**exponent for exponent in range(3, 10))
_IDENTITY_DURATIONS: Final = tuple(0.001 * 2**exponent for exponent in range(15))
_REVIEW_DURATIONS: Final = (0.25, 0.5, 0.7, 1.0, 1.5, 3.0, 5.0, 10.0)
_METHODS: Final = frozenset({"DELETE", "GET", "LIST", "PATCH", "POST", "PUT", "WATCH"})
_SIZED: Final = frozenset({"GET", "LIST"})
_READ_ONLY: Final = frozenset({"GET", "HEAD"})


class Reported(NamedTuple):
    """A request as metrics tell it from others."""

    verb: str
    group: str = ""
    version: str = ""
    resource: str = ""
    subresource: str = ""
    scope: str = ""


def reported(method: str, info: RequestInfo | None = None, *, is_served: bool = False) -> Reported:
    """The labels of a request; of what is not served they tell the verb alone.

    `k8s.io/apiserver/pkg/endpoints/metrics`: `CleanScope`, `CanonicalVerb`, `cleanVerb`. A path of no resource stands
    in `subresource`.
    """
    scope = _scope(info) if info is not None and is_served else ""
    verb = "GET" if method == "HEAD" else method
    if verb == "GET" and scope in ("namespace", "cluster"):
        verb = "LIST"
    if info is not None and info.verb == "watch":
        verb = "WATCH"
    if verb not in _METHODS:
        verb = "other"
    if info is None or not is_served:
        return Reported(verb)
    if not info.is_resource_request:
        return Reported(verb, subresource=info.path.rstrip("/"))
    return Reported(verb, info.api_group, info.api_version, info.resource, info.subresource, scope)


class Metrics:
    """Counted since the server began."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter(
            "apiserver_request_total",
            "Requests by verb, group, version, resource, subresource, scope, component and code of the answer.",
            (*_REPORTED, "dry_run", "component", "code"),
        )
        self._durations = self._histogram(
            "apiserver_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            (*_REPORTED, "dry_run", "component"),
            _DURATIONS,
        )
        self._sizes = self._histogram(
            "apiserver_response_sizes",
            "Bytes of the bodies of answers to requests that read.",
            (*_REPORTED, "component"),
            _SIZES,
        )
        self._inflight = self._gauge(
            "apiserver_current_inflight_requests", "Requests under way that are not long-running.", ("request_kind",)
        )
        self._longrunning = self._gauge(
            "apiserver_longrunning_requests", "Long-running requests under way.", (*_REPORTED, "component")
        )
        self._terminations = self._counter(
            "apiserver_request_terminations_total",
            "Requests that were refused or ended in self-defence: for their number, their time, or a right taken back.",
            (*_REPORTED, "component", "code"),
        )
        self._aborts = self._counter(
            "apiserver_request_aborts_total", "Answers that were cut short by this server.", _REPORTED
        )
        self._authentications = self._histogram(
            "authentication_duration_seconds", "Time to name a request's user.", ("result",), _IDENTITY_DURATIONS
        )
        self._authorizations = self._histogram(
            "authorization_duration_seconds", "Time to authorize a request.", ("result",), _IDENTITY_DURATIONS
        )
        self._token_reviews, self._token_review_durations = self._reviews("apiserver_delegated_authn", "TokenReviews")
        self._access_reviews, self._access_review_durations = self._reviews(
            "apiserver_delegated_authz", "SubjectAccessReviews"
        )
        self._handshake_errors = self._counter(
            "apiserver_tls_handshake_errors_total", "Connections whose TLS handshake failed.", ()
        )
        self._lost = self._counter(
            "aggregation_lost_connections_total",
            "Connections closed since they, or all together, were over a limit, or sent what is no request.",
            ("reason",),
        )
        for kind in ("readOnly", "mutating"):
            self._inflight.labels(kind).set(0)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    @contextmanager
    def under_way(self, method: str) -> Iterator[None]:
        """A request is handled while the block runs, unless it becomes long-running."""
        gauge = self._inflight.labels("readOnly" if method in _READ_ONLY else "mutating")
        with gauge.track_inprogress():
            yield

    @contextmanager
    def long_running(self, method: str, request: Reported) -> Iterator[None]:
        """A request that was under way is long-running while the block runs."""
        inflight = self._inflight.labels("readOnly" if method in _READ_ONLY else "mutating")
        inflight.dec()
        try:
            with self._longrunning.labels(*request, _COMPONENT).track_inprogress():
                yield
        finally:
            inflight.inc()

    def answered(self, request: Reported, *, code: int, seconds: float, size: int) -> None:
        """The answer to a request, of whose body `size` bytes were sent, is over."""
        self._requests.labels(*request, "", _COMPONENT, code).inc()
        self._durations.labels(*request, "", _COMPONENT).observe(seconds)
        if request.verb in _SIZED:
            self._sizes.labels(*request, _COMPONENT).observe(size)

    def terminated(self, request: Reported, *, code: int) -> None:
        """A request was refused, or ended, for what it would take or since it is no longer allowed."""
        self._terminations.labels(*request, _COMPONENT, code).inc()

    def aborted(self, request: Reported) -> None:
        """An answer that had begun was cut short."""
        self._aborts.labels(*request).inc()

    def authenticated(self, result: Result, seconds: float) -> None:
        """A request's user is known, or not."""
        self._authentications.labels(result).observe(seconds)

    def authorized(self, result: Result, seconds: float) -> None:
        """It is decided whether a request is allowed."""
        self._authorizations.labels(result).observe(seconds)

    def token_reviewed(self, code: str, seconds: float) -> None:
        """kube-apiserver answered a TokenReview, or did not."""
        self._token_reviews.labels(code).inc()
        self._token_review_durations.labels(code).observe(seconds)

    def access_reviewed(self, code: str, seconds: float) -> None:
        """kube-apiserver answered a SubjectAccessReview, or did not."""
        self._access_reviews.labels(code).inc()
        self._access_review_durations.labels(code).observe(seconds)

    def lost(self, loss: Loss) -> None:
        """A connection was closed for a limit, or for what it sent."""
        if loss == "handshake":
            self._handshake_errors.inc()
        else:
            self._lost.labels(loss).inc()

    def _reviews(self, prefix: str, what: str) -> tuple[Counter, Histogram]:
        return (
            self._counter(f"{prefix}_request_total", f"{what} by code of the answer.", ("code",)),
            self._histogram(
                f"{prefix}_request_duration_seconds",
                f"Time that {what} took, by code of the answer.",
                ("code",),
                _REVIEW_DURATIONS,
            ),
        )

    def _counter(self, name: str, meaning: str, labels: Sequence[str]) -> Counter:
        return Counter(name, meaning, labels, registry=self._registry)

    def _gauge(self, name: str, meaning: str, labels: Sequence[str]) -> Gauge:
        return Gauge(name, meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, meaning, labels, registry=self._registry, buckets=buckets)


def _scope(info: RequestInfo) -> str:
    if info.name or info.verb == "create":
        return "resource"
    if info.namespace:
        return "namespace"
    return "cluster" if info.is_resource_request else ""
