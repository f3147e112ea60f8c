"""Our certificate authority: keys and certificates of our own, and which of them sign and which are trusted when.

A new CA is made when half of the present one's life is over. It is trusted from its first moment on, and signs only
after everyone has had time to learn of it; the old one is trusted until it expires. So no certificate in use is ever
signed by a CA that somebody doesn't know.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW = timedelta(minutes=10)
"""Certificates are valid from this long before they are made: our clock may be five minutes ahead, another's behind."""

USAGES = {"server auth": ExtendedKeyUsageOID.SERVER_AUTH, "client auth": ExtendedKeyUsageOID.CLIENT_AUTH}
"""The extended key usages, as Kubernetes writes them, that we sign for."""

# What cryptography raises besides ValueError: for an encrypted key, an unknown algorithm, a missing or odd extension.
_UNREADABLE = (
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long a CA and the certificates it signs are valid.

    `propagation` goes by from a CA's making to its first signature, when there is an older one to sign meanwhile.
    Raises `ValueError` when certificates of an old CA could still be needed at its end.
    """

    ca: timedelta = timedelta(days=365)
    propagation: timedelta = timedelta(hours=1)
    leaf: timedelta = timedelta(days=7)

    def __post_init__(self) -> None:
        if self.propagation + self.leaf > self.ca / 2:
            raise ValueError(
                "half of a CA's life must be longer than its propagation and a certificate's life together"
            )


USUAL = Lifetimes()


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """One CA: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, now: datetime, *, lifetime: timedelta = USUAL.ca) -> Self:
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        # A name of its own: two CAs of one name would leave it to each verifier how it tells them apart.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kubepcap-ca-{identifier.digest.hex()[:16]}")])
        made = _whole_seconds(now)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(made - CLOCK_SKEW)
            .not_valid_after(made + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def from_pem(cls, *, certificate: bytes, key: bytes) -> Self:
        """Raises `ValueError` unless they are an EC key and the certificate of it, which is a CA's and has a name."""
        try:
            read = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, None)
            public = read.public_key()
            constraints = read.extensions.get_extension_for_class(x509.BasicConstraints).value
            read.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except _UNREADABLE as error:
            raise ValueError(str(error)) from error
        if not isinstance(private, ec.EllipticCurvePrivateKey) or public != private.public_key():
            raise ValueError("the certificate is not that of the key")
        if not constraints.ca:
            raise ValueError("the certificate is not a CA's")
        return cls(read, private)

    @property
    def name(self) -> str:
        """Unique; fit for a key of a Secret."""
        identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return identifier.digest.hex()[:16]

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def begins(self) -> datetime:
        return self.certificate.not_valid_before_utc

    @property
    def made(self) -> datetime:
        return self.begins + CLOCK_SKEW

    @property
    def expires(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def renew_at(self) -> datetime:
        """Half of its life."""
        return self.made + (self.expires - self.made) / 2

    def sign(
        self,
        request: x509.CertificateSigningRequest,
        *,
        common_name: str,
        dns_names: Collection[str],
        usage: x509.ObjectIdentifier,
        lifetime: timedelta = USUAL.leaf,
        now: datetime,
    ) -> bytes:
        """A certificate (PEM) for the request's key; nothing else is taken from the request. It ends with the CA."""
        public = request.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise TypeError("the request's key is no EC key")
        issuer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        made = _whole_seconds(now)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(made - CLOCK_SKEW, self.begins))
            .not_valid_after(min(made + lifetime, self.expires))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        )
        if dns_names:
            names = x509.SubjectAlternativeName([x509.DNSName(name) for name in sorted(dns_names)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Plan:
    """What holds at a moment: who is trusted, newest first; who signs; whether a CA is due; when to look again."""

    trusted: Sequence[CertificateAuthority]
    signing: CertificateAuthority | None
    create: bool
    changes_at: datetime


def plan(
    authorities: Collection[CertificateAuthority], now: datetime, *, propagation: timedelta = USUAL.propagation
) -> Plan:
    """What to do with these CAs now. Without any that is valid, one has to be made before anything is signed.

    One that is valid only later was made while a clock was far ahead: it is trusted, for it may have signed something,
    but it neither signs nor stands in the way of a new one.
    """
    trusted = sorted((ca for ca in authorities if now < ca.expires), key=lambda ca: (ca.made, ca.name), reverse=True)
    valid = [ca for ca in trusted if ca.begins <= now]
    if not valid:
        return Plan(trusted, None, create=True, changes_at=now)
    known = [ca for ca in valid if ca.made + propagation <= now]
    signing = known[0] if known else valid[-1]
    moments = [ca.expires for ca in trusted] + [ca.made + propagation for ca in valid] + [valid[0].renew_at]
    return Plan(
        trusted,
        signing,
        create=valid[0].renew_at <= now,
        changes_at=min((moment for moment in moments if moment > now), default=now),
    )


def _whole_seconds(moment: datetime) -> datetime:
    """X.509 has no fractions."""
    return moment.replace(microsecond=0)


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
