"""What trusts us, and how our CAs are kept."""

import base64
import copy
import logging
from datetime import UTC, datetime

import pytest

from controller.authority import CertificateAuthority
from controller.bundles import apiservice_trusting, read_authorities, webhooks_trusting, write_authorities

BUNDLE = b"-----BEGIN CERTIFICATE-----\n"
ENCODED = base64.b64encode(BUNDLE).decode()


def secret(data: dict[str, bytes]) -> dict[str, dict[str, str]]:
    return {"data": {key: base64.b64encode(value).decode() for key, value in data.items()}}


def test_an_apiservice_gets_the_bundle_and_keeps_all_else() -> None:
    given = {"metadata": {"name": "x"}, "spec": {"group": "g", "caBundle": "b2xk"}}
    before = copy.deepcopy(given)
    wanted = apiservice_trusting(given, BUNDLE)
    assert wanted == {"metadata": {"name": "x"}, "spec": {"group": "g", "caBundle": ENCODED}}
    assert given == before
    assert apiservice_trusting(wanted, BUNDLE) == wanted


def test_webhooks_get_the_bundle_and_the_path() -> None:
    service = {"name": "kubepcap-webhook", "namespace": "kubepcap", "port": 443}
    given = {
        "webhooks": [
            {"name": "stamp.kubepcap.io", "clientConfig": {"service": service | {"path": "/old"}}, "timeoutSeconds": 5}
        ]
    }
    wanted = webhooks_trusting(given, BUNDLE, path="secret")
    assert wanted["webhooks"] == [
        {
            "name": "stamp.kubepcap.io",
            "clientConfig": {"service": service | {"path": "/stamp/secret"}, "caBundle": ENCODED},
            "timeoutSeconds": 5,
        }
    ]
    assert webhooks_trusting(wanted, BUNDLE, path="secret") == wanted


def test_a_webhook_at_a_url_keeps_its_address() -> None:
    given = {"webhooks": [{"name": "judge.kubepcap.io", "clientConfig": {"url": "https://127.0.0.1/x"}}]}
    (webhook,) = webhooks_trusting(given, BUNDLE, path="secret")["webhooks"]
    assert webhook["clientConfig"] == {"url": "https://127.0.0.1/x", "caBundle": ENCODED}


def test_cas_survive_the_secret() -> None:
    authorities = [CertificateAuthority.create(datetime(2030, month, 1, tzinfo=UTC)) for month in (1, 2)]
    named = {ca.name: ca for ca in authorities}
    again = read_authorities(secret(write_authorities(named)))
    assert {name: ca.expires for name, ca in again.items()} == {name: ca.expires for name, ca in named.items()}


@pytest.mark.parametrize("damage", ["no key", "no PEM", "no base64"])
def test_a_damaged_ca_is_left_out_and_logged(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = (CertificateAuthority.create(datetime(2030, 1, 1, tzinfo=UTC)) for _ in range(2))
    stored = secret(write_authorities({good.name: good, bad.name: bad}))
    if damage == "no key":
        del stored["data"][f"{bad.name}.key"]
    else:
        stored["data"][f"{bad.name}.crt"] = {"no PEM": "eA==", "no base64": "%"}[damage]
    with caplog.at_level(logging.ERROR):
        assert list(read_authorities(stored)) == [good.name]
    assert bad.name in caplog.text
