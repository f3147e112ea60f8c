import pytest

from apiserver.aggregation.authentication import User
from apiserver.aggregation.authorization import Decision, decide, forbidden, review
from apiserver.aggregation.requestinfo import parse

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
def test_only_an_undenied_permission_allows(status: dict[str, object], decision: Decision) -> None:
    assert decide(status) == decision


@pytest.mark.parametrize("status", [None, {}, [], "allowed", {"allowed": "true"}, {"allowed": 1}, {"denied": False}])
def test_a_review_without_an_answer_is_an_error_and_no_permission(status: object) -> None:
    with pytest.raises(ValueError, match="no status"):
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
