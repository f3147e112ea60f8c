"""What both servers are asked, and where they answer differently.

`{G}`, `{V}` and `{R}` are the group, version and resource that a server serves, `{F}` is the subresource with which our
objects are asked for: a flunder there, the files of a capture here.
"""

from dataclasses import dataclass

_STATUS = "application/json"


@dataclass(frozen=True, slots=True)
class Difference:
    """What ours answers where the Go server answers otherwise, and why that stays."""

    ours: str
    why: str


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    difference: Difference | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path[:100]}"


AMBIGUOUS = Difference(
    f"400 BadRequest {_STATUS}",
    "A path or query that two programs could read differently is refused before anyone is asked about it. The Go "
    "server reads it as kube-apiserver does, being of the same code.",
)
NOT_A_TARGET = Difference(
    f"404 NotFound {_STATUS}", "OPTIONS * asks about no path (RFC 9110, 9.3.7), and nobody needs to ask."
)
NO_SUCH_PATH = Difference(
    f"404 NotFound {_STATUS}",
    "Outside its groups the Go server answers 404 with a list of its paths, ours with a Status.",
)
NOT_SERVED = Difference(
    f"404 NotFound {_STATUS}",
    "Nobody asks an aggregated server for this: the index has another name, single checks, version and dumps are for "
    "kube-apiserver, and a group's document that is not there had better be missing than empty.",
)
METRICS = Difference(
    "200 text/plain; version=0.0.4; charset=utf-8", "The same text format of Prometheus, written by another library."
)
NO_PREFIX = Difference(
    f"200 {_STATUS}", "A slash at the end is no other document; the Go server answers it as an unknown group's, empty."
)
NO_RESOURCE = Difference(
    f"400 BadRequest {_STATUS}",
    "The Go server calls a path without a resource after watch/ or proxy/ an error of its own (500).",
)
NO_PROXY = Difference(
    f"404 NotFound {_STATUS}",
    "Under proxy/ kube-apiserver reads no subresource, so RBAC on it would not count. Nothing is there for anyone, and "
    "nobody has to be asked to say so.",
)
READ_ONLY_WATCH = Difference(
    f"405 MethodNotAllowed {_STATUS}",
    "Under watch/ every method is authorized as a watch, so others are refused without asking.",
)
READ_ONLY = Difference(
    f"405 MethodNotAllowed {_STATUS}", "Flunders and the Go server's OpenAPI take other methods too."
)
HEAD = Difference(
    f"200 {_STATUS}",
    "HEAD is what GET is, without the content (RFC 9110, 9.3.2), and tells a download's size beforehand.",
)
NOT_HTTP = Difference(
    f"400 BadRequest {_STATUS}",
    "What is no request of HTTP, such as one with a method that nobody has registered, is refused by the parser, in a "
    "Status; Go's net/http refuses less, and in plain text.",
)

_GROUP = "/apis/{G}"
_VERSION = "/apis/{G}/{V}"
_NAMESPACE = f"{_VERSION}/namespaces/dev"
_OBJECT = f"{_NAMESPACE}/{{R}}/web{{F}}"
_WATCHED = f"{_VERSION}/watch/namespaces/dev/{{R}}/web{{F}}"
_PROXIED = f"{_VERSION}/proxy/namespaces/dev/{{R}}/web{{F}}"
_WRITES = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_NOT_HTTPS = ("BREW", "get")


def _gets(*paths: str, difference: Difference | None = None) -> tuple[Request, ...]:
    return tuple(Request("GET", path, difference) for path in paths)


def _others(path: str, *, head: Difference | None = None, writes: Difference | None = None) -> tuple[Request, ...]:
    return (
        Request("HEAD", path, head),
        *(Request(method, path, writes) for method in _WRITES),
        *(Request(method, path, NOT_HTTP) for method in _NOT_HTTPS),
    )


DISCOVERY = (
    *_gets("/apis", "/apis/", _GROUP, f"{_GROUP}/", _VERSION, f"{_VERSION}/", "/openapi/v2", "/openapi/v3", "/"),
    *_gets(f"/openapi/v3{_VERSION}", "/apis?a=b", f"{_VERSION}?timeout=32s"),
    *_gets("/openapi/v3/", difference=NO_PREFIX),
    *_others("/apis", head=HEAD),
    *_others(_VERSION, head=HEAD),
    *_others("/openapi/v2", writes=READ_ONLY),
)
HEALTH = (
    *_gets("/healthz", "/livez", "/readyz", "/livez?exclude=x"),
    *_gets("/healthz/", "/readyz/x", difference=NO_SUCH_PATH),
    *_gets("/healthz/ping", difference=NOT_SERVED),
    *_others("/healthz"),
)
ELSEWHERE = (
    *_gets("/metrics", difference=METRICS),
    *_gets("/index.html", "/version", "/openapi/v3/apis/nothing.example.com/v7", difference=NOT_SERVED),
    *_gets(
        "/api",
        "/api/v7",
        "/api/v7/namespaces/dev/pods",
        "/nothing",
        "/nothing/at/all",
        "/openapi",
        "/APIS/{G}/{V}",
        "/apis/nothing.example.com",
        "/apis/nothing.example.com/v7",
        "/apis/nothing.example.com/v7/namespaces/dev/{R}/web{F}",
        difference=NO_SUCH_PATH,
    ),
    *_others("/nothing", writes=NO_SUCH_PATH),
)
RESOURCES = (
    *_gets(
        _OBJECT,
        f"{_OBJECT}/",
        f"{_OBJECT}?a=b&c",
        f"{_GROUP}/v9",
        f"{_GROUP}/v9/namespaces/dev/{{R}}/web{{F}}",
        f"{_VERSION}/nothing",
        f"{_VERSION}/nothing/web",
        f"{_VERSION}/namespaces",
        _NAMESPACE,
        f"{_NAMESPACE}/nothing",
        f"{_NAMESPACE}/nothing?fieldSelector=metadata.name%3Dweb",
        f"{_NAMESPACE}/nothing?watch=true",
        f"{_NAMESPACE}/nothing/web",
        f"{_NAMESPACE}/{{R}}/none{{F}}",
        f"{_NAMESPACE}/{{R}}/web/nothing",
        f"{_NAMESPACE}/{{R}}/web/nothing/more",
        f"{_VERSION}/{{R}}/web/nothing",
        f"{_VERSION}/watch/namespaces/dev/nothing",
        f"{_NAMESPACE}/{{R}}/{'a' * 3000}{{F}}",
    ),
    *(Request("HEAD", _OBJECT, HEAD), Request("POST", _OBJECT), Request("OPTIONS", _OBJECT), Request("TRACE", _OBJECT)),
    *(Request(method, _OBJECT, READ_ONLY) for method in ("PUT", "PATCH")),
    *(Request(method, _OBJECT, NOT_HTTP) for method in _NOT_HTTPS),
    Request("POST", f"{_NAMESPACE}/nothing"),
    Request("DELETE", f"{_NAMESPACE}/nothing"),
    Request("DELETE", f"{_NAMESPACE}/nothing/web"),
    *(Request(method, _WATCHED, READ_ONLY_WATCH) for method in _WRITES),
    *_gets(f"{_VERSION}/watch", f"{_VERSION}/watch/", f"{_VERSION}/proxy", difference=NO_RESOURCE),
    *_gets(_PROXIED, f"{_VERSION}/proxy/namespaces/dev/{{R}}", f"{_VERSION}/proxy/{{R}}/web", difference=NO_PROXY),
    Request("POST", _PROXIED, NO_PROXY),
)
ODD = (
    *_gets(
        f"{_OBJECT}//",
        f"{_OBJECT}/..",
        f"{_OBJECT}/../../other{{F}}",
        f"{_OBJECT}/.",
        f"{_OBJECT}?a=%zz",
        f"{_OBJECT}?a;b",
        f"{_NAMESPACE}/{{R}}/./web{{F}}",
        f"{_NAMESPACE}/{{R}}/../{{R}}/web{{F}}",
        f"{_NAMESPACE}//{{R}}/web{{F}}",
        f"{_VERSION}//namespaces/dev/{{R}}/web{{F}}",
        f"{_VERSION}/namespaces%2Fdev/{{R}}/web{{F}}",
        f"{_NAMESPACE}/{{R}}/%77eb{{F}}",
        f"{_NAMESPACE}/{{R}}/web{{F}}%2F..%2F..%2Fother{{F}}",
        f"{_NAMESPACE}/{{R}}/%2e%2e/web{{F}}",
        f"{_NAMESPACE}/{{R}}/web%252e{{F}}",
        f"{_NAMESPACE}/{{R}}/web%00{{F}}",
        f"{_NAMESPACE}/{{R}}/web%20{{F}}",
        f"{_NAMESPACE}/{{R}}/web%zz{{F}}",
        f"{_NAMESPACE}/{{R}}/web;a=b{{F}}",
        f"{_NAMESPACE}/{{R}}/web\\{{F}}",
        f"{_VERSION}//",
        "/apis//{G}/{V}",
        "//apis/{G}/{V}",
        "/apis/../apis/{G}/{V}",
        "/apis/{G}/../{G}/{V}",
        "/%61pis/{G}/{V}",
        "/apis%2F{G}/{V}",
        "//",
        "///",
        "/.",
        "/..",
        "/healthz/..",
        "//healthz",
        "/healthz%2f",
        "/%68ealthz",
        "http://localhost/apis",
        difference=AMBIGUOUS,
    ),
    *_gets("apis", difference=NOT_HTTP),
    Request("OPTIONS", "*", NOT_A_TARGET),
)

REQUESTS = (*DISCOVERY, *HEALTH, *ELSEWHERE, *RESOURCES, *ODD)
