"""Our API server and one that is built on `k8s.io/apiserver` answer the same requests in the same way.

Compared are the status code, the `reason` of a `metav1.Status`, the content type, and what kube-apiserver was asked to
review. Where they differ, the table says how and why, and complains when they no longer do.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.pki import Authority, Pair
from kube.client import Json
from tests.cluster.conformance.paths import REQUESTS, Difference, Request
from tests.cluster.conformance.reviews import UNREVIEWABLE
from tests.cluster.conformance.servers import (
    ALLOWED,
    NO_CONNECTION,
    Headers,
    Outcome,
    Servers,
    Side,
    side_by_side,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    with bare_control_plane(tmp_path_factory.mktemp("conformance-plane")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(plane: BareControlPlane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    async with side_by_side(plane, tmp_path_factory.mktemp("conformance")) as started:
        yield started


Ask = Callable[[Servers, Side, Request, str, bool], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class Compared:
    """What one request came to on both servers, and what each had kube-apiserver review for it."""

    ours: Outcome
    theirs: Outcome
    our_reviews: list[Json]
    their_reviews: list[Json]

    @property
    def is_same(self) -> bool:
        return self.ours == self.theirs and self.our_reviews == self.their_reviews

    def explains(self, difference: Difference) -> bool:
        """Whether ours does as the difference says: it asks for the same review, or refuses without one."""
        is_as_said = str(self.ours) == difference.ours or self.ours == self.theirs
        return is_as_said and self.our_reviews in ([], self.their_reviews)


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
async def test_a_request_is_answered_as_kubernetes_would_answer_it(servers: Servers, request_: Request) -> None:
    compared = {
        f"{name}, {'allowed' if allowed else 'denied'}": await _compare(servers, request_, ask, allowed=allowed)
        for name, ask in (("direct", _direct), ("through kube-apiserver", _through))
        for allowed in (True, False)
        if ask is _direct or request_.path.startswith("/apis/{G}")
    }

    unlike = {way: result for way, result in compared.items() if not result.is_same}
    if request_.difference is None:
        assert unlike == {}
    else:
        assert unlike, "this no longer differs: take it off the list"
        assert {way: result for way, result in unlike.items() if not result.explains(request_.difference)} == {}
    # Whatever else differs, nobody gets from ours what the Go server would have refused.
    given = {way: result for way, result in compared.items() if result.ours.gives and not result.theirs.gives}
    assert given == {} or request_.method == "HEAD"


async def _compare(servers: Servers, request: Request, ask: Ask, *, allowed: bool) -> Compared:
    user = servers.new_user("someone")
    ours, theirs = [await ask(servers, side, request, user, allowed) for side in servers.sides]
    return Compared(ours, theirs, servers.ours.reviewed(user), servers.theirs.reviewed(user))


async def _direct(servers: Servers, side: Side, request: Request, user: str, allowed: bool) -> Outcome:
    headers = [("X-Remote-User", user), *([("X-Remote-Group", ALLOWED)] if allowed else [])]
    return await servers.direct(
        side, request.path, method=request.method, headers=headers, certificate=servers.front_proxy
    )


async def _through(servers: Servers, side: Side, request: Request, user: str, allowed: bool) -> Outcome:
    headers = [("Impersonate-User", user), *([("Impersonate-Group", ALLOWED)] if allowed else [])]
    return await servers.through(side, request.path, method=request.method, headers=headers)


AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
JSON_ALONE = Difference(
    "200 application/json", "Documents are JSON, whatever is accepted: kubectl can read nothing less."
)


@pytest.mark.parametrize(
    ("path", "accept", "difference"),
    [
        ("/apis", AGGREGATED, None),
        ("/apis", f"{AGGREGATED},application/json", None),
        ("/apis", f"application/json,{AGGREGATED}", None),
        ("/apis", f"application/yaml,{AGGREGATED}", None),
        ("/apis", "application/json;g=apidiscovery.k8s.io;v=v9;as=APIGroupDiscoveryList,application/json", None),
        ("/apis", "application/json;as=APIGroupDiscoveryList,application/json", None),
        ("/apis", "", None),
        ("/apis", "application/*", JSON_ALONE),
        ("/apis", "application/yaml", JSON_ALONE),
        ("/apis", "application/vnd.kubernetes.protobuf", JSON_ALONE),
        ("/apis", "text/html", JSON_ALONE),
        ("/apis/{G}", AGGREGATED, JSON_ALONE),
        ("/apis/{G}", "application/json, */*", None),
        ("/apis/{G}/{V}", AGGREGATED, JSON_ALONE),
        ("/apis/{G}/{V}", "application/json, */*", None),
        ("/apis/{G}/{V}", "text/html", JSON_ALONE),
        ("/openapi/v3", "application/json", None),
        ("/openapi/v3/apis/{G}/{V}", "application/json", None),
        ("/openapi/v3/apis/{G}/{V}", "text/html", JSON_ALONE),
        ("/openapi/v2", "application/json", None),
    ],
)
async def test_documents_are_negotiated_as_kubernetes_would(
    servers: Servers, path: str, accept: str, difference: Difference | None
) -> None:
    user = servers.new_user("someone")
    headers = [("X-Remote-User", user), ("Accept", accept)]

    ours, theirs = [
        await servers.direct(side, path, headers=headers, certificate=servers.front_proxy) for side in servers.sides
    ]

    if difference is None:
        assert ours == theirs
    else:
        assert ours != theirs, "this no longer differs: take it off the list"
        assert str(ours) == difference.ours


@pytest.mark.parametrize(
    ("path", "accept"),
    [("/apis", AGGREGATED), ("/openapi/v2", "application/json"), ("/openapi/v3/apis/{G}/{V}", "application/json")],
)
async def test_a_document_that_is_known_is_not_sent_again(servers: Servers, path: str, accept: str) -> None:
    for side in servers.sides:
        headers = [("X-Remote-User", servers.new_user("someone")), ("Accept", accept)]
        asked = side.path(path)
        tag = (await side.server.ask(asked, headers=headers, certificate=servers.front_proxy)).headers["ETag"]
        again = await side.server.ask(
            asked, headers=[*headers, ("If-None-Match", tag)], certificate=servers.front_proxy
        )
        assert (again.code, again.body, again.headers["ETag"]) == (304, b"", tag)


@pytest.mark.parametrize(
    ("path", "accept"), [("/apis", AGGREGATED), ("/apis", "*/*"), ("/apis/{G}", "*/*"), ("/apis/{G}/{V}", "*/*")]
)
async def test_a_document_has_the_fields_that_kubernetes_gives_it(servers: Servers, path: str, accept: str) -> None:
    ours, theirs = [
        await side.server.ask(
            side.path(path), headers=[("X-Remote-User", "someone"), ("Accept", accept)], certificate=servers.front_proxy
        )
        for side in servers.sides
    ]

    only_ours, only_theirs = fields(ours.json) - fields(theirs.json), fields(theirs.json) - fields(ours.json)
    assert {name for name in only_ours if not name.startswith(SUBRESOURCES)} <= {"apiVersion"}
    assert only_theirs <= UNUSED


SUBRESOURCES = "items.versions.resources.subresources"
# The address of the nearest server, which kube-apiserver fills in itself, and a mark of how objects are stored.
UNUSED = {
    "groups.serverAddressByClientCIDRs",
    "groups.serverAddressByClientCIDRs.clientCIDR",
    "groups.serverAddressByClientCIDRs.serverAddress",
    "resources.storageVersionHash",
}


def fields(value: Any, *, under: str = "") -> set[str]:
    """The names of all fields, with those above them."""
    if isinstance(value, list):
        return {name for item in value for name in fields(item, under=under)}
    if not isinstance(value, dict):
        return set()
    names = {key: f"{under}.{key}" if under else key for key in value}
    return {*names.values(), *(name for key, item in value.items() for name in fields(item, under=names[key]))}


CERTIFICATES: dict[str, Callable[[Servers], Pair | None]] = {
    "no certificate": lambda _: None,
    "another CA's": lambda _: Authority.create("front-proxy").issue("front-proxy-client"),
    "another name's": lambda servers: servers.world.plane.front_proxy.issue("someone-else"),
    "the front proxy's": lambda servers: servers.front_proxy,
}
RIGHTS = ("allowed", "denied", UNREVIEWABLE)
# "{user}" and "{group}" are the names that RBAC gives the right to, or not.
NAMINGS: dict[str, Headers] = {
    "nobody": [],
    "user": [("X-Remote-User", "{user}")],
    "groups": [
        ("X-Remote-User", "{user}"),
        ("X-Remote-Group", "a,b"),
        ("x-remote-group", "{group}"),
        ("X-Remote-Group", ""),
        ("X-Remote-Group", "zoë"),
    ],
    "extra": [
        ("X-Remote-User", "{user}"),
        ("X-Remote-Extra-Scopes", "view"),
        ("X-Remote-Extra-scopes", "list"),
        ("X-Remote-Extra-Example.com%2FKey%20A", "a%20b"),
        ("X-Remote-Extra-Bad%zz", "c"),
        ("X-Remote-Extra-", "d"),
    ],
    "uid": [("X-Remote-User", "{user}"), ("X-Remote-Uid", "u-1"), ("X-Remote-Uid", "u-2")],
    "spoofed": [
        ("X-Remote-User", "{user}"),
        ("X-Remote-User", "allowed-199"),
        ("X-Remote-Groups", "system:masters"),
        ("Remote-User", "allowed-199"),
        ("X-Forwarded-User", "allowed-199"),
    ],
}
OBJECT, DISCOVERED, HEALTH = "/apis/{G}/{V}/namespaces/dev/{R}/web{F}", "/apis/{G}/{V}", "/healthz"

REFUSED_AT_ONCE = Difference(str(NO_CONNECTION), "OpenSSL ends a handshake over a certificate that it can't verify.")
NO_ANONYMITY = Difference(
    "401 Unauthorized application/json",
    "The Go server calls who names nobody system:anonymous and has it reviewed; here only health is for everyone.",
)
HEALTH_FOR_ALL = Difference(
    "200 text/plain; charset=utf-8", "Health is for everyone, even for who shows credentials that are not valid."
)
FAILED = Difference(
    "500 InternalError application/json", "The Go server says in plain text that the review failed, ours in a Status."
)


def named(naming: str, user: str, right: str) -> Headers:
    group = ALLOWED if right == "allowed" else "strangers"
    return [(name, value.replace("{user}", user).replace("{group}", group)) for name, value in NAMINGS[naming]]


def difference_of(certificate: str, naming: str, right: str, path: str) -> Difference | None:
    if certificate == "another CA's":
        return REFUSED_AT_ONCE
    if certificate == "no certificate":
        return None if path == HEALTH else NO_ANONYMITY
    if certificate == "another name's" or naming == "nobody":
        return HEALTH_FOR_ALL if path == HEALTH else None
    if path == HEALTH:
        return None
    return FAILED if right == UNREVIEWABLE else None


@pytest.mark.parametrize("right", RIGHTS)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("certificate", CERTIFICATES)
async def test_a_user_is_believed_and_admitted_as_kubernetes_would(
    servers: Servers, certificate: str, naming: str, right: str
) -> None:
    pair = CERTIFICATES[certificate](servers)
    for path in (OBJECT, DISCOVERED, HEALTH):
        user = servers.new_user(right)
        headers = named(naming, user, right)
        ours, theirs = [await servers.direct(side, path, headers=headers, certificate=pair) for side in servers.sides]
        difference = difference_of(certificate, naming, right, path)
        if difference is None:
            assert ours == theirs
        else:
            assert ours != theirs, "this no longer differs: take it off the list"
            assert str(ours) == difference.ours
        assert servers.ours.reviewed(user) == as_reviewed_by_ours(servers.theirs.reviewed(user), naming)
        assert theirs.gives or not ours.gives or difference is HEALTH_FOR_ALL


def as_reviewed_by_ours(reviews: list[Json], naming: str) -> list[Json]:
    """kube-apiserver passes a user's UID on in X-Remote-Uid even where its ConfigMap names no header for it.

    The Go server then overlooks it; ours does not.
    """
    return [review | {"uid": "u-1"} for review in reviews] if naming == "uid" else reviews


@pytest.mark.parametrize(
    ("code", "reason", "times"),
    [
        (500, "InternalError", 1),
        (500, "ServerTimeout", 1),
        (504, "Timeout", 1),
        (429, "TooManyRequests", 1),
        (503, "ServiceUnavailable", 1),
        (409, "Conflict", 1),
        (500, "", 1),
        (504, "", 1),
        (403, "", 1),
        (500, "InternalError", 10),  # it takes four seconds until both give up
    ],
)
async def test_a_refused_review_is_asked_for_again_as_often_as_kubernetes_would(
    servers: Servers, code: int, reason: str, times: int
) -> None:
    user = servers.new_user("allowed")
    for side in servers.sides:
        side.reviews.refusals[user] = [(code, reason)] * times

    ours, theirs = await asyncio.gather(
        *(
            servers.direct(side, OBJECT, headers=[("X-Remote-User", user)], certificate=servers.front_proxy)
            for side in servers.sides
        )
    )

    assert servers.ours.reviewed(user) == servers.theirs.reviewed(user)
    assert (ours.code, ours.gives) == (theirs.code, theirs.gives)
    if not ours.gives:
        assert str(ours) == FAILED.ours


@pytest.mark.parametrize(
    ("naming", "said"),
    [
        ("user", {}),
        ("groups", {"groups": ["a,b", "strangers", "zoë"]}),
        ("extra", {"extra": {"scopes": ["view", "list"]}}),
        ("uid", {"uid": "u-1"}),
    ],
)
async def test_what_a_front_proxy_says_of_a_user_is_what_is_reviewed(servers: Servers, naming: str, said: Json) -> None:
    """That the two agree is no proof that either read anything."""
    user = servers.new_user("denied")

    await servers.direct(servers.ours, OBJECT, headers=named(naming, user, "denied"), certificate=servers.front_proxy)

    (spec,) = servers.ours.reviewed(user)
    assert spec["groups"][: len(said.get("groups", []))] == said.get("groups", [])
    assert spec["groups"][-1] == "system:authenticated"
    assert spec.get("uid") == said.get("uid")
    assert spec.get("extra", {}).items() >= said.get("extra", {}).items()


@pytest.mark.parametrize("path", [OBJECT, DISCOVERED, HEALTH])
@pytest.mark.parametrize(
    "headers",
    [
        [("Impersonate-Extra-Scopes", "view"), ("Impersonate-Extra-Example.com%2FKey", "a b")],
        [("Impersonate-Group", "a,b"), ("Impersonate-Group", "zoe")],
        [("Impersonate-Group", ALLOWED), ("X-Remote-User", "allowed-199"), ("X-Remote-Group", "system:masters")],
    ],
    ids=["extra", "groups", "spoofed"],
)
async def test_a_user_comes_through_kube_apiserver_whole(servers: Servers, path: str, headers: Headers) -> None:
    user = servers.new_user("someone")

    ours, theirs = [
        await servers.through(side, path, headers=[("Impersonate-User", user), *headers]) for side in servers.sides
    ]

    assert ours == theirs
    assert servers.ours.reviewed(user) == servers.theirs.reviewed(user)


@pytest.mark.parametrize("path", [OBJECT, DISCOVERED])
async def test_a_uid_comes_through_kube_apiserver(servers: Servers, path: str) -> None:
    user = servers.new_user("someone")
    headers = [("Impersonate-User", user), ("Impersonate-Uid", "u-1")]

    ours, theirs = [await servers.through(side, path, headers=headers) for side in servers.sides]

    assert ours == theirs
    their_reviews = servers.theirs.reviewed(user)
    if path == OBJECT:  # kube-apiserver has refused it
        assert (servers.ours.reviewed(user), their_reviews) == ([], [])
    else:
        assert servers.ours.reviewed(user) == as_reviewed_by_ours(their_reviews, "uid") != their_reviews


@pytest.mark.parametrize("right", ["allowed", "denied"])
async def test_impersonation_means_nothing_behind_kube_apiserver(servers: Servers, right: str) -> None:
    """kube-apiserver has acted on it and passes none of its headers on; the Go server would act on them again."""
    user, other = servers.new_user(right), servers.new_user(right)
    headers = [
        ("Impersonate-User", "allowed-199"),
        ("Impersonate-Group", "system:masters"),
        ("Impersonate-Extra-Scopes", "all"),
    ]

    def as_user(name: str) -> Headers:
        return [("X-Remote-User", name)]

    ours, theirs = [
        await servers.direct(side, OBJECT, headers=[*as_user(user), *headers], certificate=servers.front_proxy)
        for side in servers.sides
    ]
    plain = await servers.direct(servers.ours, OBJECT, headers=as_user(other), certificate=servers.front_proxy)

    assert ours == theirs == plain
    (spec,) = servers.ours.reviewed(user)
    assert [spec] == [review | {"user": user} for review in servers.ours.reviewed(other)]
    verbs = {review["resourceAttributes"]["verb"] for review in servers.theirs.reviewed(user)}
    assert any(verb.startswith("impersonate") for verb in verbs), "this no longer differs"


@pytest.mark.parametrize("path", [OBJECT, DISCOVERED, HEALTH])
@pytest.mark.parametrize(
    ("authorization", "difference"),
    [
        ("Bearer {token}", None),
        ("bearer {token}", None),
        ("Bearer nonsense", None),
        ("Bearer ", NO_ANONYMITY),
        ("Basic eDp5", NO_ANONYMITY),
        ("{token}", NO_ANONYMITY),
    ],
)
async def test_a_token_is_taken_as_kubernetes_would(
    servers: Servers, path: str, authorization: str, difference: Difference | None
) -> None:
    _, token, _ = await servers.world.kubectl("create", "token", "kubepcap-agent", "--namespace=kubepcap")
    headers = [("Authorization", authorization.replace("{token}", token.decode().strip()))]
    if path == HEALTH:
        difference = HEALTH_FOR_ALL if authorization == "Bearer nonsense" else None

    ours, theirs = [await servers.direct(side, path, headers=headers) for side in servers.sides]

    if difference is None:
        assert ours == theirs
    else:
        assert ours != theirs, "this no longer differs: take it off the list"
        assert str(ours) == difference.ours
