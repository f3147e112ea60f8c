"""Who makes a request: kube-apiserver's word for it, or a token's.

kube-apiserver, acting as front proxy, names the user in headers. Anyone can write such headers, so they count only on a
connection whose client certificate chains to the CA for front proxies, and only from a name on its list. CA, names and
headers come from a ConfigMap that kube-apiserver publishes; they are followed while the server runs.
"""

import hashlib
import hmac
import json
import logging
import re
import secrets
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from multidict import CIMultiDictProxy

from apiserver.aggregation.review import Observe, Reviewer, ReviewError, unobserved
from kube.answers import Answers
from kube.client import CONFIGMAPS, TOKENREVIEWS, Client, Json
from kube.status import internal_error, unauthorized
from kube.watch import Cache, Key

_log = logging.getLogger(__name__)

_CONFIGMAP_NAMESPACE = "kube-system"
_CONFIGMAP_NAME = "extension-apiserver-authentication"
_AUTHENTICATED = "system:authenticated"
_UNAUTHENTICATED = "system:unauthenticated"
_ANONYMOUS = "system:anonymous"
_REVIEW_LIFETIME = 10.0
_REVIEWS = 4096
_REVIEWS_WEIGHT = 32 << 20
# What Python adds to each string.
_STRING_OVERHEAD = 64

# What aiohttp makes of bytes that it can't decode (PEP 383).
_NOT_UTF_8 = re.compile("[\ud800-\udfff]")

Headers = CIMultiDictProxy[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """`k8s.io/apiserver/pkg/authentication/user.Info`."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """About how many bytes of memory it takes."""
        extra = (text for key, values in self.extra.items() for text in (key, *values))
        return sum(len(text) + _STRING_OVERHEAD for text in (self.name, self.uid, *self.groups, *extra))


ANONYMOUS = User(name=_ANONYMOUS, groups=(_UNAUTHENTICATED,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated:
    """The user of a request and the token that names them; without one, a front proxy does."""

    user: User
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontProxy:
    """How front proxies prove themselves and name users. An empty `allowed_names` allows any name."""

    client_ca: bytes
    authorities: Mapping[bytes, x509.Certificate]
    allowed_names: tuple[str, ...]
    username_headers: tuple[str, ...]
    uid_headers: tuple[str, ...]
    group_headers: tuple[str, ...]
    extra_header_prefixes: tuple[str, ...]

    @classmethod
    def parse(cls, configmap: Json) -> "FrontProxy":
        """Read kube-apiserver's ConfigMap. Raises `ValueError` when it says nothing usable of front proxies."""
        data = configmap.get("data") or {}
        published = str(data.get("requestheader-client-ca-file", "")).encode()
        if not published.strip():
            raise ValueError("it has no requestheader-client-ca-file: kube-apiserver runs without an aggregation layer")
        authorities = x509.load_pem_x509_certificates(published)
        return cls(
            # Without the comments between certificates, which may be in any script; `ssl` takes ASCII alone.
            client_ca=b"".join(authority.public_bytes(Encoding.PEM) for authority in authorities),
            authorities={authority.public_bytes(Encoding.DER): authority for authority in authorities},
            # As they are: a list of nothing but an empty name allows that name alone, and not any.
            allowed_names=_strings(data, "requestheader-allowed-names"),
            username_headers=_headers(data, "requestheader-username-headers"),
            # Published only where kube-apiserver is told to. It sends the header nevertheless, and as of 1.32, which is
            # the oldest that we run on, it never lets a user's own one through.
            uid_headers=_headers(data, "requestheader-uid-headers") or ("X-Remote-Uid",),
            group_headers=_headers(data, "requestheader-group-headers"),
            extra_header_prefixes=_headers(data, "requestheader-extra-headers-prefix"),
        )

    def allows(self, common_name: str) -> bool:
        return not self.allowed_names or common_name in self.allowed_names

    def user(self, headers: Headers) -> User | None:
        """The user whom the headers name; None when they name nobody.

        Raises `ValueError` for bytes that are not UTF-8: no such name can exist, and passing it on would change it.
        """
        name = _value(headers, self.username_headers)
        if not name:
            return None
        user = User(
            name=name,
            uid=_value(headers, self.uid_headers),
            groups=tuple(group for header in self.group_headers for group in headers.getall(header, ()) if group),
            extra=_extra(headers, self.extra_header_prefixes),
        )
        extra = (text for key, values in user.extra.items() for text in (key, *values))
        if _NOT_UTF_8.search("".join((user.name, user.uid, *user.groups, *extra))):
            raise ValueError("the headers that name the user are not UTF-8")
        return user


@dataclass(frozen=True, slots=True)
class Peer:
    """A client certificate that was verified when its connection was made, and the CAs (DER) that could do so then.

    Of a session that was resumed none are known: it was verified some time before, and not again.
    """

    certificate: x509.Certificate
    trusted_then: frozenset[bytes]

    @property
    def common_name(self) -> str:
        names = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(names[-1].value) if names else ""

    def is_trusted(self, authorities: Mapping[bytes, x509.Certificate], now: datetime) -> bool:
        """Whether the certificate holds now, under CAs (by their DER) that may have changed or run out since.

        It does when every CA that may have verified it is still trusted, or when one of today's has issued it.
        """
        if not _is_valid(self.certificate, now):
            return False
        valid = {der: authority for der, authority in authorities.items() if _is_valid(authority, now)}
        if self.trusted_then and self.trusted_then <= valid.keys():
            return True
        return any(_issued(authority, self.certificate) for authority in valid.values())


class Connection(Protocol):
    """What `asyncio.BaseTransport` tells of a connection."""

    def get_extra_info(self, name: str, /) -> object: ...


class Authenticator:
    """Names the user of each request, from front-proxy headers or, failing that, a bearer token."""

    def __init__(
        self,
        client: Client,
        *,
        on_trust: Callable[[bytes], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_review: Observe = unobserved,
    ) -> None:
        """`on_trust` is told the CA of front proxies (PEM) whenever it changes, and has new connections verified by it.

        It may raise `ssl.SSLError` to say that it can't; then what was known before stays in force.
        """
        self._client = client
        self._on_trust = on_trust
        self._now = now
        self._front_proxy: FrontProxy | None = None
        self._peers: WeakKeyDictionary[object, Peer] = WeakKeyDictionary()
        self._reviewer = Reviewer(client, TOKENREVIEWS, observe=on_review)
        self._reviews: Answers[bytes, User | None] = Answers(
            lifetime=lambda _: _REVIEW_LIFETIME,
            size=_REVIEWS,
            weigh=lambda user: user.weight if user else 0,
            capacity=_REVIEWS_WEIGHT,
        )
        self._review_key = secrets.token_bytes(32)
        self._configmaps = Cache(
            client,
            CONFIGMAPS,
            FrontProxy.parse,
            namespace=_CONFIGMAP_NAMESPACE,
            field_selector=f"metadata.name={_CONFIGMAP_NAME}",
            on_change=self._changed,
        )

    async def run(self) -> None:
        """Follow the ConfigMap for ever."""
        await self._configmaps.run()

    def check(self) -> str | None:
        """What is missing before users can be told apart."""
        if self._front_proxy is not None:
            return None
        unreadable = self._configmaps.unparsable.get(Key(_CONFIGMAP_NAMESPACE, _CONFIGMAP_NAME), "not read yet")
        return f"ConfigMap {_CONFIGMAP_NAMESPACE}/{_CONFIGMAP_NAME}: {unreadable}"

    async def authenticate(self, headers: Headers, connection: Connection | None) -> Authenticated:
        """The user, as a member of `system:authenticated`.

        Raises `StatusError` 401 when nobody is named, and when the token is not valid or could not be checked.
        `Impersonate-*` headers mean nothing here: kube-apiserver has already acted on them.
        """
        user = self._named_by_front_proxy(headers, connection)
        if user is not None:
            return Authenticated(user=_with_authenticated(user))
        token = bearer_token(headers.get("Authorization", ""))
        if token is None:
            raise unauthorized()
        try:
            return Authenticated(user=await self._named_by_token(token), token=token)
        except ReviewError as error:
            _log.error("a TokenReview failed: %s", error)
            raise unauthorized() from error

    async def confirm(self, authenticated: Authenticated) -> User:
        """The user of a request that lasts, as they are now: a token can be withdrawn, a front proxy's word can't.

        Raises `StatusError`: 401 when the token is no longer valid, 500 when that can't be told.
        """
        if authenticated.token is None:
            return authenticated.user
        try:
            return await self._named_by_token(authenticated.token)
        except ReviewError as error:
            raise internal_error(f"Internal error occurred: a TokenReview failed: {error}") from error

    def _named_by_front_proxy(self, headers: Headers, connection: Connection | None) -> User | None:
        front_proxy = self._front_proxy
        if front_proxy is None or connection is None:
            return None
        peer = self._peer(connection)
        if peer is None:
            return None
        if not front_proxy.allows(peer.common_name):
            _log.warning("a front proxy's certificate names %r, which is not allowed", peer.common_name)
            return None
        if not peer.is_trusted(front_proxy.authorities, self._now()):
            _log.warning("the certificate of front proxy %r no longer holds", peer.common_name)
            return None
        try:
            return front_proxy.user(headers)
        except ValueError as error:
            raise unauthorized(f"Unauthorized: {error}") from error

    def _peer(self, connection: Connection) -> Peer | None:
        if (known := self._peers.get(connection)) is not None:
            return known
        tls = connection.get_extra_info("ssl_object")
        if not isinstance(tls, ssl.SSLObject) or (certificate := tls.getpeercert(binary_form=True)) is None:
            return None
        # With a verify mode other than CERT_NONE, OpenSSL has no peer certificate that it did not verify.
        now = self._now()
        trusted = frozenset(
            authority
            for authority in (() if tls.session_reused else tls.context.get_ca_certs(binary_form=True))
            if _is_valid(x509.load_der_x509_certificate(authority), now)
        )
        peer = Peer(x509.load_der_x509_certificate(certificate), trusted)
        self._peers[connection] = peer
        return peer

    async def _named_by_token(self, token: str) -> User:
        key = hmac.digest(self._review_key, token.encode(errors="surrogateescape"), hashlib.sha256)
        user = await self._reviews.get(key, lambda: self._review(token))
        if user is None:
            raise unauthorized()
        return _with_authenticated(user)

    async def _review(self, token: str) -> User | None:
        return reviewed_user(await self._reviewer.status({"token": token}))

    def _changed(self, key: Key) -> None:
        front_proxy = self._configmaps.objects.get(key)
        if front_proxy is None:
            _log.warning("the ConfigMap %s/%s is gone or unusable; what it said last stays in force", *key)
            return
        if self._front_proxy is None or front_proxy.client_ca != self._front_proxy.client_ca:
            try:
                self._on_trust(front_proxy.client_ca)
            except ssl.SSLError as error:
                # No other OSError: what may pass must not leave a CA trusted that was withdrawn.
                _log.warning("the CA of front proxies can't be used, the last one stays in force: %s", error)
                return
        self._front_proxy = front_proxy


def bearer_token(authorization: str) -> str | None:
    """The token in an `Authorization` header (RFC 6750), read as k8s.io/apiserver does; None when it has none."""
    scheme, _, rest = authorization.strip().partition(" ")
    token = rest.partition(" ")[0]
    return token if scheme.lower() == "bearer" and token else None


def reviewed_user(status: Json) -> User | None:
    """The user of a TokenReview's status, None when the token is not valid.

    Raises `StatusError` 401 when it is not valid and the review says why, since k8s.io/apiserver doesn't keep that
    answer either, and `ReviewError` for an answer without a user name.
    """
    if status.get("authenticated") is not True:
        if status.get("error"):
            raise unauthorized()
        return None
    user = status.get("user") or {}
    if not user.get("username"):
        raise ReviewError("it names no user")
    return User(
        name=user["username"],
        uid=user.get("uid") or "",
        groups=tuple(user.get("groups") or ()),
        extra={key: tuple(values or ()) for key, values in (user.get("extra") or {}).items()},
    )


def _with_authenticated(user: User) -> User:
    if user.name == _ANONYMOUS or _AUTHENTICATED in user.groups or _UNAUTHENTICATED in user.groups:
        return user
    return replace(user, groups=(*user.groups, _AUTHENTICATED))


def _strings(data: Mapping[str, str], key: str) -> tuple[str, ...]:
    try:
        values = json.loads(data.get(key) or "null")
    except ValueError as error:
        raise ValueError(f"{key} is no list of strings") from error
    values = [] if values is None else values  # how Go writes a list that was never made
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} is no list of strings")
    return tuple(values)


def _headers(data: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in _strings(data, key) if name.strip())


def _value(headers: Headers, names: Sequence[str]) -> str:
    return next((value for name in names if (value := headers.get(name, ""))), "")


def _extra(headers: Headers, prefixes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    extra: dict[str, tuple[str, ...]] = {}
    for prefix in map(str.lower, prefixes):
        # Thousands of groups are as many headers of one name: each name is looked at once.
        for header in dict.fromkeys(map(str.lower, headers)):
            if header.startswith(prefix):
                key = header[len(prefix) :]
                if not re.search(r"%(?![0-9a-f]{2})", key):  # kept as it is when it can't be decoded
                    key = unquote(key, errors="surrogateescape")
                extra[key] = (*extra.get(key, ()), *headers.getall(header))
    return extra


def _is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def _issued(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
