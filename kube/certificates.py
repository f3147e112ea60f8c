"""Keys, certificates and TLS contexts that change while a program runs.

Each program makes its own key and has it certified through a CertificateSigningRequest by the project's own signer, so
no key ever travels. Contexts are exchanged for new connections; those that are open keep what they have.
"""

import asyncio
import base64
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kube.client import CERTIFICATESIGNINGREQUESTS, CONFIGMAPS, Client, Json
from kube.status import StatusError
from kube.watch import Cache, Key

_log = logging.getLogger(__name__)

SERVING_SIGNER = "kubepcap.io/serving"
SERVING_USAGES = ("digital signature", "server auth")
CLIENT_SIGNER = "kubepcap.io/client"
CLIENT_USAGES = ("digital signature", "client auth")
CA_CONFIGMAP = "kubepcap-ca"
CA_KEY = "ca.crt"

_SIGNING_PATIENCE = 60.0
_SHORTEST_RETRY = 1.0
_LONGEST_RETRY = 60.0
_LONGEST_SLEEP = 60.0


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate chain and its private key, both PEM."""

    certificate: bytes
    key: bytes
    not_after: datetime

    @classmethod
    def of(cls, *, certificate: bytes, key: bytes) -> "KeyPair":
        """Raises `ValueError` unless the first certificate is that of the key."""
        leaf = x509.load_pem_x509_certificate(certificate)
        private = serialization.load_pem_private_key(key, None)
        if leaf.public_key() != private.public_key():
            raise ValueError("the certificate is not that of the key")
        return cls(certificate, key, leaf.not_valid_after_utc)

    def renew_at(self, received: datetime) -> datetime:
        """After two thirds of what was left of it when it came: early enough for a signer that is away for a while."""
        return received + (self.not_after - received) * 2 / 3

    def load_into(self, context: ssl.SSLContext) -> None:
        with _as_file(self.certificate) as certificate, _as_file(self.key) as key:
            context.load_cert_chain(certificate, key)


class Identity:
    """A certificate of our own signer, obtained at start and renewed for ever."""

    def __init__(
        self,
        client: Client,
        *,
        signer: str,
        usages: Sequence[str],
        common_name: str,
        dns_names: Sequence[str] = (),
        on_change: Callable[[KeyPair], None] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client = client
        self._now = now
        self._sleep = sleep
        self._signer = signer
        self._usages = usages
        self._common_name = common_name
        self._dns_names = dns_names
        self._on_change = on_change
        self._obtained = asyncio.Event()
        self.current: KeyPair | None = None

    async def obtained(self) -> KeyPair:
        """Wait for the first certificate."""
        await self._obtained.wait()
        assert self.current is not None  # noqa: S101 - set before the event is
        return self.current

    async def run(self) -> NoReturn:
        delay = _SHORTEST_RETRY
        while True:
            try:
                self.current = await self._request()
            except (StatusError, ValueError) as error:
                _log.warning("no certificate of %s for %s yet: %s", self._signer, self._common_name, error)
                await self._sleep(delay)
                delay = min(delay * 2, _LONGEST_RETRY)
                continue
            received = self._now()
            _log.info("certificate of %s for %s until %s", self._signer, self._common_name, self.current.not_after)
            self._obtained.set()
            if self._on_change is not None:
                self._on_change(self.current)
            if self.current.not_after <= received:  # by our clock alone, perhaps: who is to accept it has another
                _log.warning("a new certificate is already over: this clock or the signer's is wrong")
                await self._sleep(delay)
                delay = min(delay * 2, _LONGEST_RETRY)
                continue
            delay = _SHORTEST_RETRY
            await self._wait_until(self.current.renew_at(received))

    async def _wait_until(self, moment: datetime) -> None:
        """In short sleeps, since the clock may be set meanwhile."""
        while (left := (moment - self._now()).total_seconds()) > 0:
            await self._sleep(min(left, _LONGEST_SLEEP))

    async def _request(self) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        created = await self._client.create(
            CERTIFICATESIGNINGREQUESTS,
            {
                "apiVersion": CERTIFICATESIGNINGREQUESTS.api_version,
                "kind": CERTIFICATESIGNINGREQUESTS.kind,
                "metadata": {"generateName": f"{self._common_name}-"},
                "spec": {
                    "signerName": self._signer,
                    "usages": list(self._usages),
                    "request": base64.b64encode(signing_request(key, self._common_name, self._dns_names)).decode(),
                },
            },
        )
        certificate = await self._signed(created["metadata"]["name"])
        return KeyPair.of(
            certificate=certificate,
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    async def _signed(self, name: str) -> bytes:
        delay = 0.1
        try:
            async with asyncio.timeout(_SIGNING_PATIENCE):
                while True:
                    request = await self._client.get(CERTIFICATESIGNINGREQUESTS, name)
                    status = request.get("status") or {}
                    if status.get("certificate"):
                        return base64.b64decode(status["certificate"])
                    for condition in status.get("conditions") or []:
                        if condition["type"] in ("Denied", "Failed"):
                            raise ValueError(f"{name} was refused: {condition.get('message', '')}")
                    await asyncio.sleep(delay)
                    delay = min(delay * 1.5, 2.0)
        except TimeoutError:
            raise ValueError(f"{name} was not signed within {_SIGNING_PATIENCE:.0f} s; is the controller up?") from None


class ServerTLS:
    """The server's side of TLS, whose certificate and trust can be exchanged while it serves.

    `client_certificates` is fixed: none asked for, asked for ("optional": a client may come without one, but one that
    it shows must be valid), or required. Until `use` has given a certificate, every handshake is refused.
    """

    def __init__(self, *, client_certificates: Literal["none", "optional", "required"]) -> None:
        self._verify_mode = {
            "none": ssl.CERT_NONE,
            "optional": ssl.CERT_OPTIONAL,
            "required": ssl.CERT_REQUIRED,
        }[client_certificates]
        self._key_pair: KeyPair | None = None
        self._client_ca: bytes | None = None
        self._refusing = self._new_context()
        self._current: ssl.SSLContext | None = None

    @property
    def asks(self) -> bool:
        """Whether clients are asked for a certificate."""
        return self._verify_mode != ssl.CERT_NONE

    @property
    def is_usable(self) -> bool:
        return self._current is not None

    @property
    def context(self) -> ssl.SSLContext:
        """The context for a connection that begins now; to be asked for anew for each, since sessions live in it."""
        return self._current or self._refusing

    def use(self, *, key_pair: KeyPair | None = None, client_ca: bytes | None = None) -> None:
        """Serve new connections with this certificate and trust these CAs (PEM); what is None stays as it was.

        Raises `ssl.SSLError` when they can't be used; then the old ones stay.
        """
        key_pair = key_pair or self._key_pair
        client_ca = client_ca or self._client_ca
        usable = key_pair is not None and (self._verify_mode == ssl.CERT_NONE or client_ca is not None)
        context = self._new_context()
        if client_ca is not None:
            context.load_verify_locations(cadata=client_ca.decode())
        if key_pair is not None:
            key_pair.load_into(context)
        self._key_pair, self._client_ca = key_pair, client_ca
        if usable:
            self._current = context

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = self._verify_mode
        # In a session that is resumed no certificate is verified. Without tickets there are none of TLS 1.3; those of
        # TLS 1.2 are kept in the context besides, which Python can't forbid. They end with it, at each change of trust.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        return context


def client_context(*, ca: bytes, key_pair: KeyPair | None = None) -> ssl.SSLContext:
    """A context that trusts `ca` (PEM) alone, checks the server's name, and shows `key_pair` when asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Where there is no name of a server, Python would take the subject's for it, which names a program (RFC 9525, 6.3).
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=ca.decode())
    if key_pair is not None:
        key_pair.load_into(context)
    return context


def bundle_cache(client: Client, *, namespace: str, on_change: Callable[[bytes], None]) -> Cache[bytes]:
    """Follow the bundle of our CA; `on_change` gets its PEM each time it changes."""

    def changed(key: Key) -> None:
        if (bundle := cache.objects.get(key)) is not None:
            on_change(bundle)

    cache = Cache(
        client,
        CONFIGMAPS,
        read_bundle,
        namespace=namespace,
        field_selector=f"metadata.name={CA_CONFIGMAP}",
        on_change=changed,
    )
    return cache


def read_bundle(configmap: Json) -> bytes:
    """The CA certificates (PEM) in our ConfigMap. Raises `ValueError` when there is none, or one that is of no use."""
    published = str((configmap.get("data") or {}).get(CA_KEY, "")).encode()
    certificates = x509.load_pem_x509_certificates(published)
    # Without the comments between them, which may be in any script; `ssl` takes ASCII alone.
    bundle = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)
    try:
        client_context(ca=bundle)
    except ssl.SSLError as error:
        raise ValueError(f"OpenSSL can't use it: {error}") from error
    return bundle


def signing_request(key: ec.EllipticCurvePrivateKey, common_name: str, dns_names: Sequence[str]) -> bytes:
    """A PKCS #10 request (RFC 2986), PEM."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    )
    if dns_names:
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path for `ssl`, which reads certificates from files only; nothing reaches a disk (memfd_create(2))."""
    descriptor = os.memfd_create("pem")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
