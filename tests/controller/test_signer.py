"""Who may have which certificate, and every way in which a request can be wrong."""

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.signer import RequestError, SigningRequest, check
from kube.certificates import signing_request

Json = dict[str, Any]
UID = "0a1b2c3d-0000-4000-8000-000000000000"
EXTRA = "authentication.kubernetes.io/"
KEY = ec.generate_private_key(ec.SECP256R1())

OWNERS = {
    "kubepcap-agent": ("DaemonSet", "kubepcap-agent"),
    "kubepcap-apiserver": ("ReplicaSet", "kubepcap-apiserver-5d9c7b8f6"),
    "kubepcap-webhook": ("ReplicaSet", "kubepcap-webhook-5d9c7b8f6"),
}
NAMES = {
    "kubepcap-agent": "node-a.agent.kubepcap",
    "kubepcap-apiserver": "kubepcap-apiserver.kubepcap.svc",
    "kubepcap-webhook": "kubepcap-webhook.kubepcap.svc",
}


def pod(account: str, **changes: Any) -> Json:
    kind, owner = OWNERS[account]
    metadata = {
        "name": f"{account}-x",
        "uid": UID,
        "labels": {"app.kubernetes.io/component": account.removeprefix("kubepcap-")},
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": kind, "name": owner, "controller": True}],
    }
    spec = {"nodeName": "node-a", "serviceAccountName": account}
    return {
        "metadata": metadata | {key: value for key, value in changes.items() if key in metadata},
        "spec": spec | {key: value for key, value in changes.items() if key in spec},
    }


def demand(account: str, names: list[str] | None = None) -> bytes:
    return signing_request(KEY, account, [NAMES[account]] if names is None else names)


def request(account: str, *, pem: bytes | None = None, status: Json | None = None, **spec: Any) -> SigningRequest:
    return SigningRequest.model_validate(
        {
            "metadata": {"name": "csr"},
            "spec": {
                "request": base64.b64encode(demand(account) if pem is None else pem).decode(),
                "signerName": "kubepcap.io/serving",
                "usages": ["digital signature", "server auth"],
                "username": f"system:serviceaccount:kubepcap:{account}",
                "extra": extra(),
            }
            | spec,
            "status": status or {},
        }
    )


def extra(**changes: list[str] | None) -> Json:
    values = {"node-name": ["node-a"], "pod-name": ["x"], "pod-uid": [UID]}
    values |= {key.replace("_", "-"): value for key, value in changes.items() if value is not None}
    return {f"{EXTRA}{key}": value for key, value in values.items()}


def built(
    *, key: Any = KEY, subject: list[tuple[Any, str]] | None = None, extensions: tuple[Any, ...] | None = None
) -> bytes:
    subject = [(NameOID.COMMON_NAME, "kubepcap-agent")] if subject is None else subject
    if extensions is None:
        extensions = (x509.SubjectAlternativeName([x509.DNSName(NAMES["kubepcap-agent"])]),)
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def of_another_version(pem: bytes) -> bytes:
    """The request with a version that PKCS #10 does not have."""
    der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)
    wrong = der.replace(b"\x02\x01\x00", b"\x02\x01\x01", 1)
    body = base64.encodebytes(wrong).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n".encode()


@pytest.mark.parametrize("account", OWNERS)
def test_each_program_gets_its_serving_certificate(account: str) -> None:
    grant = check(request(account), pod(account), namespace="kubepcap")
    assert (grant.common_name, list(grant.dns_names)) == (account, [NAMES[account]])
    assert grant.usage == ExtendedKeyUsageOID.SERVER_AUTH
    assert grant.lifetime == timedelta(days=7)


def test_the_apiserver_gets_a_client_certificate_without_a_name() -> None:
    client: Json = {"signerName": "kubepcap.io/client", "usages": ["client auth", "digital signature"]}
    pem = demand("kubepcap-apiserver", [])
    grant = check(request("kubepcap-apiserver", pem=pem, **client), pod("kubepcap-apiserver"), namespace="kubepcap")
    assert grant.usage == ExtendedKeyUsageOID.CLIENT_AUTH
    assert list(grant.dns_names) == []


def test_a_shorter_life_may_be_asked_for_and_a_longer_one_is_not_given() -> None:
    for seconds, lifetime in ((3600, timedelta(hours=1)), (10**8, timedelta(days=7))):
        asked = request("kubepcap-agent", expirationSeconds=seconds)
        assert check(asked, pod("kubepcap-agent"), namespace="kubepcap").lifetime == lifetime
    day = timedelta(days=1)
    assert check(request("kubepcap-agent"), pod("kubepcap-agent"), namespace="kubepcap", lifetime=day).lifetime == day


AGENT = "kubepcap-agent"
SERVICE_ACCOUNT = "system:serviceaccount:"
CLIENT = {"signerName": "kubepcap.io/client", "usages": ["digital signature", "client auth"]}


@pytest.mark.parametrize(
    ("reason", "asked", "known"),
    [
        ("RequesterUnknown", {"username": "system:admin"}, {}),
        ("RequesterUnknown", {"username": f"{SERVICE_ACCOUNT}kubepcap:default"}, {}),
        ("RequesterUnknown", {"username": f"{SERVICE_ACCOUNT}dev:kubepcap-agent"}, {}),
        ("RequesterUnknown", {"username": f"{SERVICE_ACCOUNT}kubepcap:kubepcap-controller"}, {}),
        ("RequesterUnknown", {"username": "kubepcap-agent"}, {}),
        ("RequesterUnknown", CLIENT, {}),
        ("TokenUnbound", {"extra": {}}, {}),
        ("TokenUnbound", {"extra": extra(node_name=[])}, {}),
        ("TokenUnbound", {"extra": extra(node_name=["node-a", "node-b"])}, {}),
        ("TokenUnbound", {"extra": extra(pod_uid=[])}, {}),
        ("TokenUnbound", {"extra": extra(pod_name=[])}, {}),
        ("PodGone", {"extra": extra(pod_uid=["another"])}, {}),
        ("PodGone", {}, {"uid": "another"}),
        ("NodeWrong", {"extra": extra(node_name=["node-b"])}, {}),
        ("NodeWrong", {}, {"nodeName": "node-b"}),
        ("NodeWrong", {}, {"nodeName": None}),
        ("PodForeign", {}, {"serviceAccountName": "kubepcap-apiserver"}),
        ("PodForeign", {}, {"labels": {}}),
        ("PodForeign", {}, {"labels": {"app.kubernetes.io/component": "webhook"}}),
        ("PodForeign", {}, {"ownerReferences": []}),
        (
            "PodForeign",
            {},
            {"ownerReferences": [{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "kubepcap-agent"}]},
        ),
        (
            "PodForeign",
            {},
            {
                "ownerReferences": [
                    {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "kubepcap-agent-2", "controller": True}
                ]
            },
        ),
        (
            "PodForeign",
            {},
            {
                "ownerReferences": [
                    {"apiVersion": "batch/v1", "kind": "DaemonSet", "name": "kubepcap-agent", "controller": True}
                ]
            },
        ),
        ("UsagesWrong", {"usages": ["digital signature", "client auth"]}, {}),
        ("UsagesWrong", {"usages": ["digital signature", "server auth", "client auth"]}, {}),
        ("UsagesWrong", {"usages": ["server auth"]}, {}),
        ("UsagesWrong", {"usages": ["digital signature", "server auth", "cert sign"]}, {}),
        ("RequestUnreadable", {"pem": b""}, {}),
        ("RequestUnreadable", {"pem": b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"}, {}),
        ("RequestUnreadable", {"request": "%"}, {}),
        ("RequestUnreadable", {"pem": of_another_version(built())}, {}),
        ("KeyWrong", {"pem": built(key=rsa.generate_private_key(65537, 2048))}, {}),
        ("KeyWrong", {"pem": built(key=ec.generate_private_key(ec.SECP384R1()))}, {}),
        ("SubjectWrong", {"pem": built(subject=[])}, {}),
        ("SubjectWrong", {"pem": built(subject=[(NameOID.COMMON_NAME, "kubepcap-apiserver")])}, {}),
        (
            "SubjectWrong",
            {"pem": built(subject=[(NameOID.ORGANIZATION_NAME, "g"), (NameOID.COMMON_NAME, "kubepcap-agent")])},
            {},
        ),
        ("NamesWrong", {"pem": built(extensions=())}, {}),
        ("NamesWrong", {"pem": demand(AGENT, ["node-b.agent.kubepcap"])}, {}),
        ("NamesWrong", {"pem": demand(AGENT, ["node-a.agent.kubepcap", "kubepcap-apiserver.kubepcap.svc"])}, {}),
        (
            "NamesWrong",
            {"pem": built(extensions=(x509.SubjectAlternativeName([x509.RFC822Name("node-a.agent.kubepcap")]),))},
            {},
        ),
        (
            "ExtensionsWrong",
            {"pem": built(extensions=(x509.BasicConstraints(ca=True, path_length=None),))},
            {},
        ),
    ],
)
def test_what_does_not_fit_the_profile_is_refused(reason: str, asked: Json, known: Json) -> None:
    with pytest.raises(RequestError) as refusal:
        check(request(AGENT, **asked), pod(AGENT, **known), namespace="kubepcap")
    assert refusal.value.reason == reason
    assert str(refusal.value)


def test_a_request_signed_with_another_key_is_refused() -> None:
    der = bytearray(x509.load_pem_x509_csr(demand(AGENT)).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    pem = (
        b"-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(bytes(der))
        + b"-----END CERTIFICATE REQUEST-----\n"
    )
    with pytest.raises(RequestError) as refusal:
        check(request(AGENT, pem=pem), pod(AGENT), namespace="kubepcap")
    assert refusal.value.reason == "SignatureWrong"


def test_a_pod_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError) as refusal:
        check(request(AGENT), None, namespace="kubepcap")
    assert refusal.value.reason == "PodGone"


@pytest.mark.parametrize(
    ("status", "pending"),
    [
        ({}, True),
        ({"conditions": [{"type": "Approved"}]}, True),
        ({"conditions": [{"type": "Denied"}]}, False),
        ({"conditions": [{"type": "Approved"}, {"type": "Failed"}]}, False),
        ({"conditions": [{"type": "Approved"}], "certificate": "eA=="}, False),
    ],
)
def test_what_is_answered_is_not_answered_again(status: Json, *, pending: bool) -> None:
    assert request(AGENT, status=status).is_pending is pending


def test_an_issued_request_goes_after_ten_minutes_and_a_denied_one_is_left() -> None:
    moment = "2030-01-01T00:00:00Z"
    issued = {"conditions": [{"type": "Approved", "lastUpdateTime": moment}], "certificate": "eA=="}
    assert request(AGENT, status=issued).goes_at() == datetime(2030, 1, 1, 0, 10, tzinfo=UTC)
    denied = {"conditions": [{"type": "Denied", "lastUpdateTime": moment}]}
    assert request(AGENT, status=denied).goes_at() is None
