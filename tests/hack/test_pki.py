import base64
import json
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from hack.clusters.pki import Authority, Pair, kubeconfig, write_private


def handshake(pair: Pair, *, trusted: Authority, name: str, directory: Path) -> None:
    """A TLS handshake in memory; ssl.SSLError when the client does not trust the server."""
    pair.write(directory, "server")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "server.crt", directory / "server.key")
    client = ssl.create_default_context(cadata=trusted.certificate.decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    waiting = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)


@pytest.mark.parametrize("name", ["kubernetes.default.svc", "10.96.0.1"])
def test_a_server_is_trusted_by_its_names_and_addresses(tmp_path: Path, name: str) -> None:
    authority = Authority.create("test")
    pair = authority.issue("server", hosts=["kubernetes.default.svc", "10.96.0.1"])
    handshake(pair, trusted=authority, name=name, directory=tmp_path)


def test_a_server_is_not_trusted_by_another_name_or_authority(tmp_path: Path) -> None:
    authority = Authority.create("test")
    pair = authority.issue("server", hosts=["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(pair, trusted=authority, name="elsewhere", directory=tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(pair, trusted=Authority.create("test"), name="localhost", directory=tmp_path)


def test_a_user_and_its_groups_are_the_subject_as_kubernetes_reads_it() -> None:
    pair = Authority.create("test").issue("alice", groups=["devs", "ops"])
    subject = x509.load_pem_x509_certificate(pair.certificate).subject
    assert [part.value for part in subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["alice"]
    assert [part.value for part in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)] == ["devs", "ops"]


def test_a_kubeconfig_holds_all_it_needs() -> None:
    authority = Authority.create("test")
    pair = authority.issue("alice")
    config = json.loads(kubeconfig(cluster="c", server="https://x", ca=authority.certificate, user="alice", pair=pair))
    assert base64.b64decode(config["users"][0]["user"]["client-key-data"]) == pair.key
    assert base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"]) == authority.certificate
    assert config["current-context"] == config["contexts"][0]["name"]


def test_a_key_is_for_its_owner_alone_even_where_a_file_was_open_to_all(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    path.chmod(0o666)
    write_private(path, b"secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"secret"
