"""CAs: which sign and which are trusted when, and that verifiers accept what they sign."""

import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from controller.authority import CLOCK_SKEW, USUAL, CertificateAuthority, Lifetimes, plan
from kube.certificates import KeyPair, client_context, signing_request

START = datetime(2030, 1, 1, tzinfo=UTC)
NAME = "kubepcap-webhook.kubepcap.svc"


def signed(ca: CertificateAuthority, now: datetime, **more: timedelta) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.load_pem_x509_csr(signing_request(key, "ignored", ["ignored"]))
    pem = ca.sign(
        request,
        common_name="kubepcap-webhook",
        dns_names=[NAME],
        usage=ExtendedKeyUsageOID.SERVER_AUTH,
        now=now,
        **more,
    )
    return x509.load_pem_x509_certificate(pem)


def test_without_a_ca_one_is_to_be_made() -> None:
    planned = plan([], START)
    assert planned.create
    assert planned.signing is None


def test_the_first_ca_signs_at_once() -> None:
    ca = CertificateAuthority.create(START)
    planned = plan([ca], START)
    assert planned.signing is ca
    assert not planned.create


@pytest.mark.parametrize(
    ("after", "trusted", "signing", "create"),
    [
        (timedelta(), "o", "o", False),
        (USUAL.ca / 2 - timedelta(seconds=1), "o", "o", False),
        (USUAL.ca / 2, "o", "o", True),
    ],
)
def test_half_its_life_a_ca_is_alone(after: timedelta, trusted: str, signing: str, *, create: bool) -> None:
    old = CertificateAuthority.create(START)
    names = {old.name: "o"}
    planned = plan([old], START + after)
    assert "".join(names[ca.name] for ca in planned.trusted) == trusted
    assert planned.signing is not None
    assert names[planned.signing.name] == signing
    assert planned.create is create


@pytest.mark.parametrize(
    ("after", "trusted", "signing", "next_change"),
    [
        (timedelta(), "no", "o", USUAL.propagation),
        (USUAL.propagation - timedelta(seconds=1), "no", "o", USUAL.propagation),
        (USUAL.propagation, "no", "n", USUAL.ca / 2),
        (USUAL.ca / 2 - timedelta(seconds=1), "no", "n", USUAL.ca / 2),
        (USUAL.ca / 2, "n", "n", USUAL.ca),
    ],
    ids=["made", "not yet known to all", "known to all", "before the old expires", "the old has expired"],
)
def test_two_cas_overlap(after: timedelta, trusted: str, signing: str, next_change: timedelta) -> None:
    renewal = START + USUAL.ca / 2
    old, new = CertificateAuthority.create(START), CertificateAuthority.create(renewal)
    names = {old.name: "o", new.name: "n"}
    planned = plan([old, new], renewal + after)
    assert "".join(names[ca.name] for ca in planned.trusted) == trusted
    assert planned.signing is not None
    assert names[planned.signing.name] == signing
    assert planned.changes_at == renewal + next_change


@pytest.mark.parametrize("off", [timedelta(), timedelta(minutes=5)], ids=["clocks are right", "leaders' are off"])
def test_no_certificate_outlives_the_trust_in_its_ca(off: timedelta) -> None:
    """Over years, in steps of six hours: whoever signs is trusted until the last certificate it signed has expired.

    Two leaders take turns, one with a clock that is ahead, the other with one that is behind.
    """
    now = START
    authorities: dict[str, CertificateAuthority] = {}
    trusted_until: dict[str, datetime] = {}
    needed_until: dict[str, datetime] = {}
    known_since: dict[str, datetime] = {}
    while now < START + timedelta(days=900):
        off = -off
        planned = plan(authorities.values(), now + off)
        if planned.create:
            made = CertificateAuthority.create(now + off)
            authorities[made.name] = made
            planned = plan(authorities.values(), now + off)
        for ca in planned.trusted:
            trusted_until[ca.name] = now
            known_since.setdefault(ca.name, now)
        assert planned.signing is not None
        name = planned.signing.name
        needed_until[name] = min(now + off + USUAL.leaf, planned.signing.expires)
        assert len(authorities) == 1 or now - known_since[name] >= USUAL.propagation
        now += timedelta(hours=6)
    assert 3 < len(authorities) <= 1 + timedelta(days=900) / (USUAL.ca / 2)
    ended = [name for name, ca in authorities.items() if ca.expires < now - abs(off)]
    assert ended
    for name in ended:
        assert needed_until[name] <= trusted_until[name]


@pytest.mark.parametrize("signer", [-5, 0, 5])
@pytest.mark.parametrize("verifier", [-5, 0, 5])
def test_who_is_five_minutes_off_accepts_what_is_new(signer: int, verifier: int) -> None:
    made = START + timedelta(minutes=signer)
    ca = CertificateAuthority.create(made)
    leaf = signed(ca, made)
    there = START + timedelta(minutes=verifier, seconds=1)
    policy = PolicyBuilder().store(Store([ca.certificate])).time(there)
    assert policy.build_server_verifier(x509.DNSName(NAME)).verify(leaf, [])[0] == leaf


def test_a_leader_that_is_five_minutes_behind_signs_with_the_ca_of_one_that_is_ahead() -> None:
    ca = CertificateAuthority.create(START + timedelta(minutes=5))
    now = START - timedelta(minutes=5) + timedelta(seconds=1)
    planned = plan([ca], now)
    assert (planned.signing, planned.create) == (ca, False)
    assert signed(ca, now).not_valid_before_utc <= now


def test_a_ca_of_a_clock_that_was_far_ahead_neither_signs_nor_stands_in_the_way() -> None:
    strange = CertificateAuthority.create(START + timedelta(days=1000))
    planned = plan([strange], START)
    assert (list(planned.trusted), planned.signing, planned.create) == ([strange], None, True)
    sound = CertificateAuthority.create(START)
    planned = plan([strange, sound], START)
    assert (list(planned.trusted), planned.signing, planned.create) == ([strange, sound], sound, False)
    assert plan([strange, sound], START + USUAL.ca / 2).create


def test_lifetimes_that_would_end_trust_too_early_are_refused() -> None:
    hour = timedelta(hours=1)
    assert Lifetimes(ca=6 * hour, propagation=hour, leaf=2 * hour).leaf == 2 * hour
    with pytest.raises(ValueError, match="must be longer"):
        Lifetimes(ca=6 * hour, propagation=hour, leaf=2 * hour + timedelta(seconds=1))


def test_a_ca_survives_being_written_and_read() -> None:
    ca = CertificateAuthority.create(START)
    again = CertificateAuthority.from_pem(certificate=ca.certificate_pem, key=ca.key_pem)
    assert (again.name, again.made, again.expires) == (ca.name, START, START + USUAL.ca)


def test_a_ca_with_another_key_is_refused() -> None:
    one, other = CertificateAuthority.create(START), CertificateAuthority.create(START)
    with pytest.raises(ValueError, match="not that of the key"):
        CertificateAuthority.from_pem(certificate=one.certificate_pem, key=other.key_pem)


def test_strict_verifiers_accept_what_is_signed() -> None:
    ca = CertificateAuthority.create(START)
    leaf = signed(ca, START)
    verifier = PolicyBuilder().store(Store([ca.certificate])).time(START).build_server_verifier(x509.DNSName(NAME))
    assert verifier.verify(leaf, [])[0] == leaf


def test_openssl_shakes_hands_by_the_strict_rules() -> None:
    """As Python does by default from 3.13 on."""
    now = datetime.now(UTC)
    ca = CertificateAuthority.create(now)
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.load_pem_x509_csr(signing_request(key, "x", []))
    certificate = ca.sign(request, common_name="x", dns_names=[NAME], usage=ExtendedKeyUsageOID.SERVER_AUTH, now=now)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    KeyPair.of(certificate=certificate, key=private).load_into(server_context)
    context = client_context(ca=ca.certificate_pem)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname=NAME)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    unfinished = [client, server]
    for _ in range(10):
        for side in list(unfinished):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
                unfinished.remove(side)
    assert not unfinished
    assert client.getpeercert()


def test_only_what_was_checked_gets_into_the_certificate() -> None:
    leaf = signed(CertificateAuthority.create(START), START)
    assert leaf.subject.rfc4514_string() == "CN=kubepcap-webhook"
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_certificate_lasts_a_week_and_is_valid_for_who_is_five_minutes_behind() -> None:
    now = START + timedelta(days=1)
    leaf = signed(CertificateAuthority.create(START), now)
    assert leaf.not_valid_before_utc == now - CLOCK_SKEW
    assert leaf.not_valid_after_utc == now + timedelta(days=7)


def test_a_certificate_ends_with_its_ca_and_when_it_was_asked_to() -> None:
    ca = CertificateAuthority.create(START)
    assert signed(ca, ca.expires - timedelta(days=1)).not_valid_after_utc == ca.expires
    assert signed(ca, START, lifetime=timedelta(hours=1)).not_valid_after_utc == START + timedelta(hours=1)


def test_an_rsa_key_is_not_signed() -> None:
    key = rsa.generate_private_key(65537, 2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(TypeError):
        CertificateAuthority.create(START).sign(
            request, common_name="x", dns_names=[], usage=ExtendedKeyUsageOID.SERVER_AUTH, now=START
        )


def made_elsewhere(*extensions: x509.ExtensionType) -> bytes:
    name = x509.Name([])
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name)
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(START)
        .not_valid_after(START + USUAL.ca)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


KEY = ec.generate_private_key(ec.SECP256R1())
IDENTIFIER = x509.SubjectKeyIdentifier.from_public_key(KEY.public_key())
IS_CA, IS_NONE = (x509.BasicConstraints(ca=ca, path_length=None) for ca in (True, False))


@pytest.mark.parametrize(
    ("extensions", "password", "message"),
    [
        pytest.param([IS_CA], None, "SubjectKeyIdentifier", id="it has no name"),
        pytest.param([IDENTIFIER], None, "BasicConstraints", id="it does not say that it is a CA's"),
        pytest.param([IS_NONE, IDENTIFIER], None, "not a CA's", id="it is no CA's"),
        pytest.param([IS_CA, IDENTIFIER], b"secret", "(?i)password", id="the key is encrypted"),
    ],
)
def test_what_is_no_ca_of_ours_is_refused(
    extensions: list[x509.ExtensionType], password: bytes | None, message: str
) -> None:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    key = KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    with pytest.raises(ValueError, match=message):
        CertificateAuthority.from_pem(certificate=made_elsewhere(*extensions), key=key)
