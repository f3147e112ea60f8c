"""Our signer of CertificateSigningRequests: a certificate for each of our programs, and for nobody else.

Whoever asks is known by the token it used: kube-apiserver writes into the request which ServiceAccount, pod and node
that was. Each ServiceAccount may ask for exactly one certificate of each kind; anything else is denied, with a reason.
"""

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import Field

from api.names import agent_server_name
from api.object import Model, ObjectMeta, Timestamp, format_timestamp
from controller.authority import USAGES, USUAL, CertificateAuthority
from kube.certificates import CLIENT_SIGNER, CLIENT_USAGES, SERVING_SIGNER, SERVING_USAGES
from kube.client import CERTIFICATESIGNINGREQUESTS, NAMESPACES, PODS, Client, Json
from kube.status import StatusError
from kube.watch import Cache, Signal

_log = logging.getLogger(__name__)

KEPT_AFTER_ISSUE = timedelta(minutes=10)
"""An issued request stays this long, for its maker to fetch the certificate and for people to look at it.

Who deletes it may be another leader, whose clock is five minutes ahead.
"""

_RETRY = 5.0
_LONGEST_PAUSE = 300.0
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    binascii.Error,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography says of a request that it can't read; the last three are not `ValueError`."""


class RequestError(Exception):
    """The request is refused; `reason` is one word for its condition, the message says what is wrong with it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Condition(Model):
    type: str
    last_update_time: Timestamp | None = None


class _Spec(Model):
    request: str
    signer_name: str
    usages: tuple[str, ...] = ()
    username: str = ""
    extra: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    expiration_seconds: int | None = None


class _Status(Model):
    conditions: tuple[_Condition, ...] = ()
    certificate: str = ""


class SigningRequest(Model):
    """`certificates.k8s.io/v1 CertificateSigningRequest`, as far as it is looked at."""

    metadata: ObjectMeta
    spec: _Spec
    status: _Status = Field(default_factory=_Status)

    def condition(self, kind: str) -> _Condition | None:
        return next((condition for condition in self.status.conditions if condition.type == kind), None)

    @property
    def is_pending(self) -> bool:
        return not (self.status.certificate or self.condition("Denied") or self.condition("Failed"))

    def goes_at(self) -> datetime | None:
        """When it may be deleted: some time after its certificate was issued."""
        approved = self.condition("Approved")
        if not self.status.certificate or approved is None or approved.last_update_time is None:
            return None
        return approved.last_update_time + KEPT_AFTER_ISSUE

    def said_of_token(self, key: str) -> str:
        """What kube-apiserver says of the token that the request was made with; empty unless it is one thing."""
        values = self.spec.extra.get(f"authentication.kubernetes.io/{key}", ())
        return values[0] if len(values) == 1 else ""


@dataclass(frozen=True, slots=True)
class Profile:
    """The one certificate that a ServiceAccount's pods may have of a signer."""

    service_account: str
    signer: str
    usages: Sequence[str]
    component: str
    controller_kind: str
    names: Callable[[str, str], Sequence[str]]
    """The DNS names, from our namespace and the pod's node."""

    @property
    def common_name(self) -> str:
        return self.service_account

    def owns(self, owner: str) -> bool:
        """Whether the owner of that name makes this profile's pods: the DaemonSet, or a Deployment's ReplicaSet."""
        if self.controller_kind == "DaemonSet":
            return owner == self.service_account
        return owner.rpartition("-")[0] == self.service_account


def _no_names(_namespace: str, _node: str) -> Sequence[str]:
    return ()


PROFILES = (
    Profile(
        service_account="kubepcap-agent",
        signer=SERVING_SIGNER,
        usages=SERVING_USAGES,
        component="agent",
        controller_kind="DaemonSet",
        names=lambda _, node: (agent_server_name(node),),
    ),
    Profile(
        service_account="kubepcap-apiserver",
        signer=SERVING_SIGNER,
        usages=SERVING_USAGES,
        component="apiserver",
        controller_kind="ReplicaSet",
        names=lambda namespace, _: (f"kubepcap-apiserver.{namespace}.svc",),
    ),
    Profile(
        service_account="kubepcap-apiserver",
        signer=CLIENT_SIGNER,
        usages=CLIENT_USAGES,
        component="apiserver",
        controller_kind="ReplicaSet",
        names=_no_names,
    ),
    Profile(
        service_account="kubepcap-webhook",
        signer=SERVING_SIGNER,
        usages=SERVING_USAGES,
        component="webhook",
        controller_kind="ReplicaSet",
        names=lambda namespace, _: (f"kubepcap-webhook.{namespace}.svc",),
    ),
)


@dataclass(frozen=True, slots=True)
class Grant:
    """What is to be signed: this key and these names, for this use."""

    request: x509.CertificateSigningRequest
    common_name: str
    dns_names: Sequence[str]
    usage: x509.ObjectIdentifier
    lifetime: timedelta


def check(request: SigningRequest, pod: Json | None, *, namespace: str, lifetime: timedelta = USUAL.leaf) -> Grant:
    """What the request may have, and for how long at most; `pod` is the one its token is bound to.

    Raises `RequestError`.
    """
    profile = _profile(request, namespace)
    node = _checked_pod(request, pod, profile)
    if sorted(request.spec.usages) != sorted(profile.usages):
        raise RequestError("UsagesWrong", f"the usages must be exactly {', '.join(profile.usages)}")
    names = profile.names(namespace, node)
    demanded = _checked_demand(request, profile.common_name, names)
    (usage,) = (USAGES[usage] for usage in profile.usages if usage in USAGES)
    if request.spec.expiration_seconds is not None:
        lifetime = min(lifetime, timedelta(seconds=request.spec.expiration_seconds))
    return Grant(demanded, profile.common_name, names, usage, lifetime)


def _profile(request: SigningRequest, namespace: str) -> Profile:
    for profile in PROFILES:
        user = f"system:serviceaccount:{namespace}:{profile.service_account}"
        if (user, profile.signer) == (request.spec.username, request.spec.signer_name):
            return profile
    raise RequestError(
        "RequesterUnknown", f"{request.spec.username} may not have a certificate of {request.spec.signer_name}"
    )


def _checked_pod(request: SigningRequest, pod: Json | None, profile: Profile) -> str:
    """The node that the pod runs on; everything that kube-apiserver says of the token must fit the pod."""
    uid, node = request.said_of_token("pod-uid"), request.said_of_token("node-name")
    if not uid or not node or not request.said_of_token("pod-name"):
        raise RequestError(
            "TokenUnbound", "the token is not that of a pod on a node, or Kubernetes is older than 1.32 and doesn't say"
        )
    metadata, spec = (pod or {}).get("metadata") or {}, (pod or {}).get("spec") or {}
    if metadata.get("uid") != uid:
        raise RequestError("PodGone", f"there is no pod with the UID {uid} of the token")
    if spec.get("nodeName") != node:
        raise RequestError("NodeWrong", f"the pod does not run on the node {node} of the token")
    if spec.get("serviceAccountName") != profile.service_account:
        raise RequestError("PodForeign", f"the pod does not run as {profile.service_account}")
    if (metadata.get("labels") or {}).get("app.kubernetes.io/component") != profile.component:
        raise RequestError("PodForeign", f"the pod has not the label of the {profile.component}")
    owners = [owner for owner in metadata.get("ownerReferences") or [] if owner.get("controller")]
    if not any(
        owner.get("apiVersion") == "apps/v1"
        and owner.get("kind") == profile.controller_kind
        and profile.owns(str(owner.get("name")))
        for owner in owners
    ):
        kind = profile.controller_kind
        raise RequestError("PodForeign", f"the pod was not made by the {kind} of {profile.service_account}")
    return node


def _checked_demand(request: SigningRequest, common_name: str, names: Sequence[str]) -> x509.CertificateSigningRequest:
    """The PKCS #10 request, when it asks for exactly this subject and these names, with a key of our kind."""
    try:
        demanded = x509.load_pem_x509_csr(base64.b64decode(request.spec.request, validate=True))
        key, extensions, subject = demanded.public_key(), demanded.extensions, list(demanded.subject)
        is_signed = demanded.is_signature_valid
    except _UNREADABLE as error:
        raise RequestError("RequestUnreadable", f"the request can't be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestError("KeyWrong", "the key must be an EC key on P-256")
    if not is_signed:
        raise RequestError("SignatureWrong", "the request is not signed with its key")
    attributes = [(attribute.oid, attribute.value) for attribute in subject]
    if attributes != [(NameOID.COMMON_NAME, common_name)]:
        raise RequestError("SubjectWrong", f"the subject must be exactly CN={common_name}")
    if any(not isinstance(extension.value, x509.SubjectAlternativeName) for extension in extensions):
        raise RequestError("ExtensionsWrong", "no extension but the subject's alternative names may be asked for")
    asked = [name for extension in extensions for name in extension.value]
    if asked != [x509.DNSName(name) for name in names]:
        wanted = ", ".join(names) or "none"
        raise RequestError("NamesWrong", f"the subject's alternative names must be exactly: {wanted}")
    return demanded


class Signer:
    """Answers requests to our signers; own `run` in a TaskGroup."""

    def __init__(
        self,
        client: Client,
        *,
        namespace: str,
        authority: Callable[[], CertificateAuthority],
        lifetime: timedelta = USUAL.leaf,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._authority = authority
        self._lifetime = lifetime
        self._clock = clock
        self._signal = Signal()
        self._owner: Json | None = None
        self._caches = [
            Cache(
                client,
                CERTIFICATESIGNINGREQUESTS,
                lambda item: (SigningRequest.model_validate(item), item),
                field_selector=f"spec.signerName={signer}",
                on_change=lambda _: self._signal.set(),
            )
            for signer in (SERVING_SIGNER, CLIENT_SIGNER)
        ]

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            for cache in self._caches:
                tasks.create_task(cache.run(), name="following certificate requests")
            while True:
                await self._signal.wait(await self._pass())
        raise AssertionError

    async def _pass(self) -> float:
        """Answer what is pending, delete what is done; returns the seconds until there is something to do again."""
        now = self._clock()
        pauses = [_LONGEST_PAUSE]
        for request, item in [known for cache in self._caches for known in cache.objects.values()]:
            goes_at = request.goes_at()
            try:
                if request.is_pending:
                    await self._answer(request, item)
                elif goes_at is not None and goes_at <= now:
                    await self._delete(request)
                elif goes_at is not None:
                    pauses.append((goes_at - now).total_seconds())
            except StatusError as error:
                if error.code not in (404, 409):  # it changed or went meanwhile: the cache will tell
                    _log.warning("certificate request %s: %s", request.metadata.name, error.message)
                pauses.append(_RETRY)
        return max(0.1, min(pauses))

    async def _answer(self, request: SigningRequest, item: Json) -> None:
        name = request.metadata.name
        item = await self._owned(name, item)
        try:
            pod = await self._pod_of(request)
            grant = check(request, pod, namespace=self._namespace, lifetime=self._lifetime)
        except RequestError as refusal:
            _log.warning("certificate request %s is refused: %s", name, refusal, extra={"user": request.spec.username})
            await self._refuse(request, item, refusal)
            return
        if request.condition("Approved") is None:
            approved = _with_condition(item, "Approved", "ProfileFits", "it asks for what it may have", self._clock())
            item = await self._update(name, approved, "approval")
        authority = self._authority()
        certificate = authority.sign(
            grant.request,
            common_name=grant.common_name,
            dns_names=grant.dns_names,
            usage=grant.usage,
            lifetime=grant.lifetime,
            now=self._clock(),
        )
        status = (item.get("status") or {}) | {"certificate": base64.b64encode(certificate).decode()}
        await self._update(name, item | {"status": status}, "status")
        _log.info(
            "certificate request %s is signed by %s",
            name,
            authority.name,
            extra={"user": request.spec.username, "names": list(grant.dns_names)},
        )

    async def _refuse(self, request: SigningRequest, item: Json, refusal: RequestError) -> None:
        """Deny it; what somebody else has approved can only be failed."""
        if request.condition("Approved") is None:
            kind, subresource = "Denied", "approval"
        else:
            kind, subresource = "Failed", "status"
        refused = _with_condition(item, kind, refusal.reason, str(refusal), self._clock())
        await self._update(request.metadata.name, refused, subresource)

    async def _owned(self, name: str, item: Json) -> Json:
        """Let the request go with our namespace, so that nothing is left when all of us is removed."""
        if item["metadata"].get("ownerReferences"):
            return item
        if self._owner is None:
            namespace = await self._client.get(NAMESPACES, self._namespace)
            self._owner = {
                "apiVersion": NAMESPACES.api_version,
                "kind": NAMESPACES.kind,
                "name": self._namespace,
                "uid": namespace["metadata"]["uid"],
            }
        metadata = {"ownerReferences": [self._owner], "resourceVersion": item["metadata"]["resourceVersion"]}
        return await self._client.patch(CERTIFICATESIGNINGREQUESTS, name, {"metadata": metadata})

    async def _pod_of(self, request: SigningRequest) -> Json | None:
        """Read from kube-apiserver itself, since a cache may not know of a new pod yet."""
        name = request.said_of_token("pod-name")
        if not name:
            return None
        try:
            return await self._client.get(PODS, name, namespace=self._namespace)
        except StatusError as error:
            if error.code == 404:
                return None
            raise

    async def _update(self, name: str, item: Json, subresource: str) -> Json:
        return await self._client.replace(CERTIFICATESIGNINGREQUESTS, name, item, subresource=subresource)

    async def _delete(self, request: SigningRequest) -> None:
        await self._client.delete(CERTIFICATESIGNINGREQUESTS, request.metadata.name, uid=request.metadata.uid)


def _with_condition(item: Json, kind: str, reason: str, message: str, now: datetime) -> Json:
    condition = {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastUpdateTime": format_timestamp(now),
    }
    status = item.get("status") or {}
    return item | {"status": status | {"conditions": [*(status.get("conditions") or []), condition]}}
