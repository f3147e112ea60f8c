import asyncio
from contextlib import nullcontext
from typing import Any

import pytest

from apiserver.aggregation.authentication import User
from apiserver.aggregation.authorization import Authorizer, Decision, decide, forbidden, is_keepable, review
from apiserver.aggregation.requestinfo import parse
from apiserver.aggregation.review import ReviewError
from kube.client import Client, Json
from kube.status import StatusError
from tests.ahead import run

ALICE = User(name="alice", uid="42", groups=("devs", "system:authenticated"), extra={"scopes": ("a", "b")})
FILES = "/apis/subresources.kubepcap.io/v1/namespaces/dev/packetcaptures/x/files"


def test_a_review_carries_everything_that_is_known_of_user_and_request() -> None:
    assert review(ALICE, parse("GET", FILES)) == {
        "user": "alice",
        "uid": "42",
        "groups": ["devs", "system:authenticated"],
        "extra": {"scopes": ["a", "b"]},
        "resourceAttributes": {
            "namespace": "dev",
            "verb": "get",
            "group": "subresources.kubepcap.io",
            "version": "v1",
            "resource": "packetcaptures",
            "subresource": "files",
            "name": "x",
        },
    }


def test_a_review_of_a_path_without_a_resource_names_the_path() -> None:
    assert review(User(name="bob"), parse("HEAD", "/openapi/v3/")) == {
        "user": "bob",
        "nonResourceAttributes": {"path": "/openapi/v3/", "verb": "head"},
    }


def test_a_review_of_a_list_carries_its_selectors() -> None:
    attributes = review(ALICE, parse("GET", "/apis/g/v1/things?fieldSelector=a%3Db&labelSelector=c"))
    assert attributes["resourceAttributes"]["fieldSelector"] == {"rawSelector": "a=b"}
    assert attributes["resourceAttributes"]["labelSelector"] == {"rawSelector": "c"}


@pytest.mark.parametrize(
    ("status", "decision"),
    [
        ({"allowed": True}, Decision(True)),
        ({"allowed": True, "denied": False, "reason": "RBAC: allowed"}, Decision(True, "RBAC: allowed")),
        ({"allowed": False}, Decision(False)),
        ({"allowed": False, "denied": True, "reason": "no"}, Decision(False, "no")),
        ({"allowed": True, "denied": True}, Decision(False)),
        ({"allowed": False, "evaluationError": "role not found"}, Decision(False)),
        ({"allowed": True, "evaluationError": "role not found"}, Decision(True)),
    ],
)
def test_only_an_undenied_permission_allows(status: Json, decision: Decision) -> None:
    assert decide(status) == decision


@pytest.mark.parametrize("status", [{}, {"allowed": "true"}, {"allowed": 1}, {"denied": False}])
def test_a_review_without_an_answer_is_an_error_and_no_permission(status: Json) -> None:
    with pytest.raises(ReviewError, match="without an answer"):
        decide(status)


@pytest.mark.parametrize(
    ("user", "method", "target", "reason", "message"),
    [
        (
            *("u", "GET", FILES, ""),
            'packetcaptures.subresources.kubepcap.io "x" is forbidden: User "u" cannot get resource '
            '"packetcaptures/files" in API group "subresources.kubepcap.io" in the namespace "dev"',
        ),
        (
            *("u", "GET", FILES + "/n1/a.pcap", ""),
            'packetcaptures.subresources.kubepcap.io "x" is forbidden: User "u" cannot get resource '
            '"packetcaptures/files" in API group "subresources.kubepcap.io" in the namespace "dev"',
        ),
        (
            *("u", "DELETE", "/api/v1/namespaces/dev/pods", ""),
            'pods is forbidden: User "u" cannot deletecollection resource "pods" in API group "" '
            'in the namespace "dev"',
        ),
        (
            *("u", "GET", "/apis/g/v1/nodes/n1", 'clusterrole "r" not found'),
            'nodes.g "n1" is forbidden: User "u" cannot get resource "nodes" in API group "g" at the cluster scope: '
            'clusterrole "r" not found',
        ),
        ("u", "GET", "/metrics", "", 'forbidden: User "u" cannot get path "/metrics"'),
        ("<u&v>", "GET", "/", "", 'forbidden: User "&lt;u&amp;v&gt;" cannot get path "/"'),
        ('zoé "z"', "POST", "/x", "", 'forbidden: User "zoé \\"z\\"" cannot post path "/x"'),
        ("a\n\t\x1b\x7f\\b", "GET", "/x", "", r'forbidden: User "a\n\t\x1b\x7f\\b" cannot get path "/x"'),
        (
            *("no\u00a0break\u200b\U000e0001", "GET", "/x", ""),
            r'forbidden: User "no\u00a0break\u200b\U000e0001" cannot get path "/x"',
        ),
    ],
)
def test_a_refusal_has_the_words_of_kubernetes(user: str, method: str, target: str, reason: str, message: str) -> None:
    refusal = forbidden(User(name=user), parse(method, target), reason)

    assert (refusal.code, refusal.reason, refusal.message) == (403, "Forbidden", message)


def test_a_refusal_names_its_object_in_the_details() -> None:
    assert forbidden(ALICE, parse("GET", FILES)).to_json()["details"] == {
        "name": "x",
        "group": "subresources.kubepcap.io",
        "kind": "packetcaptures",
    }


def test_a_refusal_of_a_path_has_empty_details() -> None:
    assert forbidden(ALICE, parse("GET", "/metrics")).to_json()["details"] == {}


def test_an_answer_about_something_very_long_is_not_kept() -> None:
    path = "/apis/subresources.kubepcap.io/v1/namespaces/dev/packetcaptures/"

    assert is_keepable(parse("GET", path + "x" * 4900))
    assert not is_keepable(parse("GET", path + "x" * 5000)), "the name counts, and the path with it once more"


class KubeAPIServer(Client):
    """Answers reviews from a script, the last one for ever; it takes no time."""

    def __init__(self, *answers: Json | StatusError) -> None:
        self.asked: list[Json] = []
        self.answers = list(answers)

    async def create(self, *arguments: Any, **_: Any) -> Json:
        self.asked.append(arguments[1]["spec"])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, StatusError):
            raise answer
        return {"status": answer}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("allowed", [True, False])
async def test_an_answer_holds_for_ten_seconds(allowed: bool) -> None:
    server, clock = KubeAPIServer({"allowed": allowed}), Clock()
    authorizer = Authorizer(server, clock=clock)

    for clock.now, asked in ((0.0, 1), (9.9, 1), (10.0, 2)):
        with nullcontext() if allowed else pytest.raises(StatusError, match="cannot get"):
            await authorizer.authorize(ALICE, parse("GET", FILES))
        assert len(server.asked) == asked


async def test_another_user_is_another_question() -> None:
    server = KubeAPIServer({"allowed": True})
    authorizer = Authorizer(server)

    for user in (
        ALICE,
        User(name="alice"),
        User(name="alice", uid="42"),
        User(name="alice", groups=("devs",)),
        User(name="alice", groups=("devs", "system:authenticated")),
        User(name="alice", extra={"scopes": ("a", "b")}),
        User(name="alice", extra={"scopes": ("a",)}),
    ):
        await authorizer.authorize(user, parse("GET", FILES))

    assert len(server.asked) == 7


async def test_a_question_that_is_not_kept_is_asked_each_time() -> None:
    server = KubeAPIServer({"allowed": True})
    authorizer = Authorizer(server)

    for _ in range(3):
        await authorizer.authorize(ALICE, parse("GET", FILES.replace("/x/", f"/{'x' * 10_000}/")))

    assert len(server.asked) == 3


@pytest.mark.parametrize("answer", [StatusError(403, "no right to ask"), {}])
async def test_what_can_not_be_told_is_an_error_and_ends_readiness(answer: Json | StatusError) -> None:
    authorizer = Authorizer(KubeAPIServer({"allowed": True}, answer, {"allowed": True}))
    await authorizer.authorize(ALICE, parse("GET", "/a"))
    assert authorizer.check() is None

    with pytest.raises(StatusError, match=r"^Internal error occurred: a SubjectAccessReview failed: ") as raised:
        await authorizer.authorize(ALICE, parse("GET", "/b"))

    assert raised.value.to_json()["reason"] == "InternalError"
    assert raised.value.to_json()["details"]["causes"][0]["message"].startswith("a SubjectAccessReview failed: ")
    assert "a SubjectAccessReview failed" in (authorizer.check() or "")
    await authorizer.authorize(ALICE, parse("GET", "/b"))
    assert authorizer.check() is None


@pytest.mark.parametrize("code", [400, 413, 422])
async def test_a_user_of_whom_nothing_can_be_asked_ends_nobody_elses_readiness(code: int) -> None:
    authorizer = Authorizer(KubeAPIServer({"allowed": True}, StatusError(code, "too many groups")))
    await authorizer.authorize(ALICE, parse("GET", "/a"))

    with pytest.raises(StatusError) as raised:
        await authorizer.authorize(User(name="bob"), parse("GET", "/a"))

    assert raised.value.code == 500
    assert authorizer.check() is None


def test_readiness_tells_how_it_is_while_nobody_asks_for_anything() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = KubeAPIServer({"allowed": True}, {"allowed": True}, StatusError(403, "no right to ask"))
        authorizer = Authorizer(server, clock=loop.time)
        assert authorizer.check() == "no SubjectAccessReview was answered yet"
        probing = asyncio.create_task(authorizer.run())

        await asyncio.sleep(1)
        assert authorizer.check() is None
        await asyncio.sleep(60)
        assert authorizer.check() == "a SubjectAccessReview failed: no right to ask"
        server.answers = [{"allowed": False}]
        await asyncio.sleep(6)
        assert authorizer.check() is None
        probing.cancel()

    run(main())
