"""AdmissionReview on the wire."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kube.status import forbidden
from webhook.review import Answer, ReviewError, parse


def review(**changes: Any) -> bytes:
    request = {
        "uid": "u-1",
        "kind": {"group": "kubepcap.io", "version": "v1", "kind": "PacketCapture"},
        "resource": {"group": "kubepcap.io", "version": "v1", "resource": "packetcaptures"},
        "name": "web",
        "namespace": "dev",
        "operation": "CREATE",
        "userInfo": {"username": "alice", "groups": ["team"], "extra": {"k": ["v"]}},
        "object": {"metadata": {"name": "web"}, "spec": {"selector": "all()"}},
        "oldObject": None,
        "dryRun": False,
    }
    return json.dumps(
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request | changes}
    ).encode()


def test_a_review_is_read() -> None:
    request = parse(review())
    assert (request.uid, request.operation, request.namespace, request.name) == ("u-1", "CREATE", "dev", "web")
    assert request.user_info.username == "alice"
    assert request.user_info.extra == {"k": ("v",)}
    assert request.is_ours


@pytest.mark.parametrize(
    "changes",
    [{"operation": "DELETE", "object": None}, {"subResource": "status"}],
    ids=["deletion", "status"],
)
def test_deletion_and_status_are_not_ours_to_decide(changes: dict[str, Any]) -> None:
    assert not parse(review(**changes)).is_ours


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no AdmissionReview"),
        (b"{", "no AdmissionReview"),
        (b"[]", "no AdmissionReview"),
        (b"\xff\xfe", "no AdmissionReview"),
        (b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"}', "request: Field required"),
        (b'{"kind":' + b"[" * 100_000, "no AdmissionReview"),
        (review().replace(b"io/v1", b"io/v1beta1", 1), "apiVersion"),
        (review(resource={"group": "", "version": "v1", "resource": "pods"}), "pods. are not judged here"),
        (review(object=None), "request.object is missing"),
        (review(operation="UPDATE"), "request.oldObject is missing"),
        (review(operation="PATCH"), "request.operation"),
        (review(object=[1]), "request.object"),
        (review(userInfo=None), "request.userInfo"),
    ],
)
def test_what_is_no_review_of_ours_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(ReviewError) as refusal:
        parse(body)
    assert words in str(refusal.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with pytest.raises(ReviewError):
        parse(body)


def test_an_answer_echoes_the_uid_and_carries_all_it_has() -> None:
    answer = Answer(patch=[{"op": "remove", "path": "/a"}], warnings=["w" * 200], audit={"rule": "allowed"})
    response = answer.to_json("u-1")["response"]
    assert response["uid"] == "u-1"
    assert response["allowed"] is True
    assert json.loads(base64.b64decode(response["patch"])) == [{"op": "remove", "path": "/a"}]
    assert response["warnings"] == ["w" * 118 + "…"]
    assert response["auditAnnotations"] == {"rule": "allowed"}


def test_a_refusal_says_why() -> None:
    response = Answer(refusal=forbidden("no")).to_json("u-1")["response"]
    assert response["allowed"] is False
    assert (response["status"]["code"], response["status"]["message"]) == (403, "no")
    assert "patch" not in response
