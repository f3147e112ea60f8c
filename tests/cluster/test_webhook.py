"""Admission as users meet it: through a real kube-apiserver, with its schema, its RBAC and kubectl's words."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from api.capturepolicy import CapturePolicy
from api.packetcapture import PacketCapture
from api.stamp import ANNOTATION, StampError, check
from hack.clusters.bare import BareControlPlane
from hack.clusters.pki import Authority
from kube.certificates import KeyPair, ServerTLS
from kube.client import (
    CAPTUREPOLICIES,
    MUTATINGWEBHOOKCONFIGURATIONS,
    NAMESPACES,
    PODS,
    VALIDATINGWEBHOOKCONFIGURATIONS,
    Client,
    Json,
    Resource,
)
from kube.serve import listening
from tests.api.test_verdict import TABLE
from webhook.admission import Admission
from webhook.server import application

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "0123456789abcdef0123456789abcdef"
SHIPPED = Path(__file__).parents[2] / "manifests" / "webhookconfigurations.yaml"
LABEL = {"judged-by": "test-webhook"}
SERVICEACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount", namespaced=True)
ROLES = Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False)
CLUSTERROLEBINDINGS = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
ROLEBINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", namespaced=True)
CONFIGURATIONS = {"stamp": MUTATINGWEBHOOKCONFIGURATIONS, "judge": VALIDATINGWEBHOOKCONFIGURATIONS}
PATIENCE = 30.0


@dataclass
class Said:
    """What kubectl printed."""

    code: int | None
    out: str
    err: str

    @property
    def stamp(self) -> Json:
        stamp: Json = json.loads(json.loads(self.out)["metadata"]["annotations"][ANNOTATION])
        return stamp


@dataclass
class World:
    plane: BareControlPlane
    client: Client
    authority: Authority
    port: int = 0
    serving: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def kubectl(self, *arguments: str, user: str = "alice", given: Json | None = None) -> Said:
        groups = ("system:masters",) if user == "admin" else ()
        return await self.kubectl_as(
            [f"--kubeconfig={self.plane.kubeconfig_for(user, *groups)}"], *arguments, given=given
        )

    async def kubectl_as(self, identity: Sequence[str], *arguments: str, given: Json | None = None) -> Said:
        process = await asyncio.create_subprocess_exec(
            self.plane.kubectl,
            *identity,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate(json.dumps(given).encode() if given else b"")
        return Said(process.returncode, out.decode(), err.decode())

    async def create(self, item: Json, *flags: str, user: str = "alice") -> Said:
        return await self.kubectl("create", "--filename=-", "--output=json", *flags, user=user, given=item)

    async def get(self, name: str, *, namespace: str = "judged") -> PacketCapture:
        said = await self.kubectl(
            "get", "packetcapture", name, f"--namespace={namespace}", "--output=json", user="admin"
        )
        return PacketCapture.model_validate_json(said.out)

    async def configure(self) -> None:
        """Register the webhook as the manifests do, but for its address, and for the namespaces of this test alone."""
        for shipped in yaml.safe_load_all(SHIPPED.read_text()):
            (webhook,) = shipped["webhooks"]
            half = webhook["name"].partition(".")[0]
            webhook["clientConfig"] = {
                "url": f"https://127.0.0.1:{self.port}/{half}/{PATH}",
                "caBundle": base64.b64encode(self.authority.certificate).decode(),
            }
            webhook["namespaceSelector"] = {"matchLabels": LABEL}
            await self.client.create(CONFIGURATIONS[half], shipped | {"metadata": {"name": "test-webhook"}})
        await self.until(is_judged=True)

    async def unconfigure(self) -> None:
        for resource in CONFIGURATIONS.values():
            await self.client.delete(resource, "test-webhook")
        await self.until(is_judged=False)

    async def until(self, *, is_judged: bool) -> None:
        """kube-apiserver learns of webhook configurations by and by."""
        said = None
        for _ in range(round(PATIENCE / 0.1)):
            said = await self.create(capture("probe", selector="all()"), "--dry-run=server", user="admin")
            if (said.code != 0) is is_judged:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"the webhook was not {'called' if is_judged else 'forgotten'}: {said}")


def capture(name: str, *, namespace: str = "judged", annotations: dict[str, str] | None = None, **spec: Any) -> Json:
    if "podSelector" not in spec:
        spec = {"selector": 'app == "nginx"'} | spec
    metadata: Json = {"name": name, "namespace": namespace}
    if annotations:
        metadata["annotations"] = annotations
    return {"apiVersion": "kubepcap.io/v1", "kind": "PacketCapture", "metadata": metadata, "spec": spec}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(crds: BareControlPlane) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=crds.kubeconfig))
        world = World(crds, client, Authority.create("test-webhook"))
        await _install(client)
        admission = Admission(client)
        for cache in (admission.policies, admission.namespaces):
            following = asyncio.create_task(cache.run(), name="following")
            stack.callback(following.cancel)
            await cache.synced()
        tls = ServerTLS(client_certificates="none")
        pair = world.authority.issue("webhook", hosts=["127.0.0.1"])
        tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key))
        world.port = await stack.enter_async_context(
            listening(
                application(admission, paths=lambda: frozenset({PATH})), port=0, host="127.0.0.1", tls=tls, grace=0
            )
        )
        await world.configure()
        yield world
        await world.unconfigure()


async def _install(client: Client) -> None:
    """Namespaces; policies; alice may use `web` in judged, bob may only edit captures, nobody may use `other`."""
    for name in ("judged", "judged-too"):
        await client.create(
            NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": LABEL}}
        )
    for name, spec in {
        "web": {"limits": {"maxDuration": "2h"}, "filters": {"deniedPorts": [22]}},
        "other": {},
    }.items():
        await client.create(
            CAPTUREPOLICIES,
            {"apiVersion": "kubepcap.io/v1", "kind": "CapturePolicy", "metadata": {"name": name}, "spec": spec},
        )
    roles = {
        "test-capturer": {"resources": ["packetcaptures"], "verbs": ["*"]},
        "test-user-of-web": {"resources": ["capturepolicies"], "resourceNames": ["web"], "verbs": ["use"]},
    }
    for name, rule in roles.items():
        await grant(client, name, rule)
    for user, namespace, role in [
        ("alice", "judged", "test-capturer"),
        ("bob", "judged", "test-capturer"),
        ("alice", "judged-too", "test-capturer"),
        ("alice", "judged", "test-user-of-web"),
    ]:
        await bind(client, role, {"kind": "User", "name": user}, namespace=namespace)


async def grant(client: Client, name: str, rule: Json) -> None:
    """A ClusterRole with one rule, of our group if it names no other."""
    rules = [{"apiGroups": ["kubepcap.io"], **rule}]
    body = {"apiVersion": ROLES.api_version, "kind": ROLES.kind, "metadata": {"name": name}, "rules": rules}
    await client.create(ROLES, body)


async def bind(client: Client, role: str, subject: Json, *, namespace: str | None) -> None:
    """Give the subject a ClusterRole in a namespace, or everywhere."""
    resource = CLUSTERROLEBINDINGS if namespace is None else ROLEBINDINGS
    group = {} if subject["kind"] == "ServiceAccount" else {"apiGroup": "rbac.authorization.k8s.io"}
    body = {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"generateName": "test-"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [subject | group],
    }
    await client.create(resource, body, namespace=namespace)


async def test_a_capture_is_stamped_with_who_and_by_which_policy(world: World) -> None:
    said = await world.create(capture("stamped", filters=[{"protocol": "TCP", "ports": [80]}]))
    assert said.code == 0, said.err
    assert said.stamp["user"] == "alice"
    assert said.stamp["policy"] == "web"
    policy = CapturePolicy.model_validate(await world.client.get(CAPTUREPOLICIES, "web"))
    stamp = check(await world.get("stamped"))
    assert stamp.limits == policy.spec.limits
    assert "Warning: no endTime: capturing ends at 20" in said.err
    assert "after 2h0m0s (policy web)" in said.err


TCP_80 = [{"protocol": "TCP", "ports": [80]}]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"selector": "app =="}, "selector"),
        ({"selector": "all()", "filters": TCP_80}, "policy web: the selector takes pods without any label too"),
        ({"filters": [{"protocol": "TCP", "ports": [70000]}]}, "ports go from 1 to 65535"),
        ({"filters": [{"protocol": "ICMP", "ports": [80]}]}, "only TCP, UDP and SCTP have them"),
        ({"filters": [{"protocol": "TCP", "ports": [22]}]}, "policy web: port 22 is denied"),
        ({"podSelector": {"matchLabels": {"a": "b"}}, "selector": "all()"}, "exactly one of selector and podSelector"),
        (
            {"startTime": "2030-01-02T00:00:00Z", "endTime": "2030-01-01T00:00:00Z", "filters": TCP_80},
            "endTime must be after startTime",
        ),
        (
            {"startTime": "2030-01-01T00:00:00Z", "endTime": "2030-01-02T00:00:00Z", "filters": TCP_80},
            "policy web: from startTime to endTime is more than 2h0m0s",
        ),
    ],
)
async def test_a_refusal_says_what_to_change_and_so_does_a_dry_run(
    world: World, spec: dict[str, Any], words: str
) -> None:
    for flags in ([], ["--dry-run=server"]):
        said = await world.create(capture("refused", **spec), *flags)
        assert said.code != 0
        assert words in said.err
        assert len(said.err.strip().splitlines()) == 1, said.err


async def test_the_right_to_use_a_policy_counts_where_it_was_given(world: World) -> None:
    said = await world.create(capture("elsewhere", namespace="judged-too", filters=TCP_80))
    assert said.code != 0
    assert "user alice may use no CapturePolicy in namespace judged-too (there are: other, web)" in said.err


async def test_an_impersonated_user_is_the_one_who_is_judged(world: World) -> None:
    said = await world.create(capture("as-bob", filters=TCP_80), "--as=bob", user="admin")
    assert said.code != 0
    assert "user bob may use no CapturePolicy" in said.err


async def test_a_stamp_can_not_be_forged(world: World) -> None:
    genuine = (await world.create(capture("genuine", filters=TCP_80))).stamp
    forged = {ANNOTATION: json.dumps(genuine | {"user": "root", "policy": "other"})}
    said = await world.create(capture("forged", annotations=forged, filters=TCP_80))
    assert said.code == 0, said.err
    assert said.stamp == genuine
    # Nor does a patch bring one, whatever the field manager.
    for arguments in (
        ["annotate", "packetcapture", "forged", "--overwrite", f"{ANNOTATION}={{}}"],
        ["annotate", "packetcapture", "forged", f"{ANNOTATION}-"],
    ):
        assert (await world.kubectl(*arguments, "--namespace=judged")).code == 0
        assert check(await world.get("forged")).user == "alice"
    applied = capture("forged", annotations={ANNOTATION: "{}"}, filters=TCP_80)
    said = await world.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", given=applied)
    assert said.code == 0, said.err
    assert check(await world.get("forged")).policy == "web"


async def test_who_may_not_use_a_policy_may_only_end_a_capture(world: World) -> None:
    await world.create(capture("shared", filters=TCP_80))

    async def patch(spec: Json) -> Said:
        return await world.kubectl(
            "patch",
            "packetcapture",
            "shared",
            "--namespace=judged",
            "--type=merge",
            f"--patch={json.dumps({'spec': spec})}",
            user="bob",
        )

    refused = await patch({"selector": 'app == "database"'})
    assert "user bob may use no CapturePolicy" in refused.err
    free: list[Json] = [{"endTime": "2030-01-02T00:00:00Z"}, {"endTime": "2030-01-01T00:00:00Z"}, {"suspend": True}]
    for spec in free:
        said = await patch(spec)
        assert said.code == 0, said.err
        assert check(await world.get("shared")).user == "alice"
    judged: list[Json] = [{"suspend": False}, {"endTime": None}, {"endTime": "2030-01-03T00:00:00Z"}]
    for spec in judged:
        assert "user bob may use no CapturePolicy" in (await patch(spec)).err
    labelled = await world.kubectl("label", "packetcapture", "shared", "--namespace=judged", "a=b", user="bob")
    assert labelled.code == 0, labelled.err
    deleted = await world.kubectl("delete", "packetcapture", "shared", "--namespace=judged", user="bob")
    assert deleted.code == 0, deleted.err


async def test_what_was_created_while_no_webhook_stood_guard_is_never_stamped(world: World) -> None:
    await world.unconfigure()
    try:
        genuine = capture("unguarded", filters=TCP_80)
        assert (await world.create(genuine)).code == 0
    finally:
        await world.configure()
    for arguments in (
        ["label", "packetcapture", "unguarded", "a=b"],
        ["annotate", "packetcapture", "unguarded", "a=b"],
    ):
        said = await world.kubectl(*arguments, "--namespace=judged")
        assert said.code == 0, said.err
    with pytest.raises(StampError) as refusal:
        check(await world.get("unguarded"))
    assert refusal.value.reason == "NotStamped"


class Identities:
    """Users of every kind that Kubernetes knows, each with a right to use one policy in the namespace `tabled`."""

    KINDS = ("user", "group", "everywhere", "service account", "impersonated")

    def __init__(self, world: World) -> None:
        self._world = world

    async def make(self, kind: str, name: str, *, role: str) -> Sequence[str]:
        """Grant the role; returns what makes kubectl this user."""
        plane, client = self._world.plane, self._world.client
        user = {"kind": "User", "name": name}
        match kind:
            case "group":
                subject: Json = {"kind": "Group", "name": f"group-of-{name}"}
                identity = [f"--kubeconfig={plane.kubeconfig_for(name, subject['name'])}"]
            case "service account":
                subject = {"kind": "ServiceAccount", "name": name, "namespace": "tabled"}
                account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
                await client.create(SERVICEACCOUNTS, account, namespace="tabled")
                request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
                token = (
                    await client.create(SERVICEACCOUNTS, request, namespace="tabled", name=name, subresource="token")
                )["status"]["token"]
                ca = plane.directory / "pki" / "ca.crt"
                identity = [
                    "--kubeconfig=/dev/null",
                    f"--server={plane.url}",
                    f"--certificate-authority={ca}",
                    f"--token={token}",
                ]
            case "impersonated":
                subject, identity = user, [f"--kubeconfig={plane.kubeconfig}", f"--as={name}"]
            case _:
                subject, identity = user, [f"--kubeconfig={plane.kubeconfig_for(name)}"]
        for bound in ("test-capturer", role):
            await bind(client, bound, subject, namespace=None if kind == "everywhere" else "tabled")
        return identity


SAMPLE = [case for name, cases in TABLE.items() if name != "times" for case in cases[1::8]]
"""Of the table of verdicts; its times are those of a clock that stands."""


async def test_a_sample_of_the_table_of_verdicts_holds_for_users_of_every_kind(world: World) -> None:
    labels = LABEL | {"team": "web"}
    await world.client.create(
        NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tabled", "labels": labels}}
    )
    identities = Identities(world)
    users = []
    for number, (rules, _, _) in enumerate(SAMPLE):
        policy = {"apiVersion": "kubepcap.io/v1", "kind": "CapturePolicy", "metadata": {"name": f"row-{number}"}}
        await world.client.create(CAPTUREPOLICIES, policy | {"spec": rules})
        may = {"resources": ["capturepolicies"], "resourceNames": [f"row-{number}"], "verbs": ["use"]}
        await grant(world.client, f"test-row-{number}", may)
        kind = identities.KINDS[number % len(identities.KINDS)]
        users.append(await identities.make(kind, f"row-{number}-user", role=f"test-row-{number}"))
    try:
        for number, ((_, fields, refusal), user) in enumerate(zip(SAMPLE, users, strict=True)):
            spec = {key: value for key, value in fields.items() if value is not None}
            given = capture("row", namespace="tabled", **spec)
            dry_run = ("create", "--dry-run=server", "--filename=-", "--output=json")
            said = await world.kubectl_as(user, *dry_run, given=given)
            for _ in range(round(PATIENCE / 0.5)):
                if "may use no CapturePolicy" not in said.err and "cannot create resource" not in said.err:
                    break
                await asyncio.sleep(0.5)  # what was granted a moment ago
                said = await world.kubectl_as(user, *dry_run, given=given)
            if refusal is None:
                assert said.code == 0, (SAMPLE[number], said)
                assert said.stamp["policy"] == f"row-{number}"
            else:
                assert said.code != 0, (SAMPLE[number], said)
                assert f"denied the request: policy row-{number}: {refusal}" in said.err, (SAMPLE[number], said)
    finally:
        for number in range(len(SAMPLE)):
            await world.client.delete(CAPTUREPOLICIES, f"row-{number}")


async def test_who_may_list_pods_is_warned_that_none_is_matched_and_others_are_not(world: World) -> None:
    item = capture("unmatched", filters=TCP_80, endTime="2020-01-01T00:00:00Z")
    said = await world.create(item, "--dry-run=server")
    assert (said.code, said.err) == (0, "")
    await grant(world.client, "test-viewer", {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]})
    await bind(world.client, "test-viewer", {"kind": "User", "name": "alice"}, namespace="judged")
    for _ in range(round(PATIENCE / 0.5)):
        said = await world.create(item, "--dry-run=server")
        if said.err:
            break
        await asyncio.sleep(0.5)  # a denial is remembered for two seconds
    assert said.err == "Warning: the selector matches no pod of namespace judged now\n"
    pod = {"metadata": {"name": "nginx", "labels": {"app": "nginx"}}}
    containers = [{"name": "nginx", "image": "x", "ports": [{"containerPort": 8080}]}]
    spec = {"containers": containers, "automountServiceAccountToken": False}
    # Without its ServiceAccount no pod is made, and here nothing makes those.
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    await world.client.create(SERVICEACCOUNTS, account, namespace="judged")
    await world.client.create(PODS, {"apiVersion": "v1", "kind": "Pod", **pod, "spec": spec}, namespace="judged")
    for _ in range(round(PATIENCE / 0.5)):
        said = await world.create(item, "--dry-run=server")
        if "declares" in said.err:
            break
        await asyncio.sleep(0.5)  # pods are looked at every two seconds
    assert said.err == "Warning: no container of the selected pods declares port 80: is that the port meant?\n"


async def test_without_the_webhook_nothing_is_created_and_everything_can_be_deleted(world: World) -> None:
    assert (await world.create(capture("outage", filters=TCP_80))).code == 0
    for resource in CONFIGURATIONS.values():
        configuration = await world.client.get(resource, "test-webhook")
        configuration["webhooks"][0]["clientConfig"]["url"] = "https://127.0.0.1:9/away"
        await world.client.replace(resource, "test-webhook", configuration)
    try:
        said = None
        for _ in range(round(PATIENCE / 0.1)):
            said = await world.create(capture("new", filters=TCP_80), "--dry-run=server")
            if said.code != 0:
                break
            await asyncio.sleep(0.1)
        assert said is not None
        assert "failed calling webhook" in said.err
        deleted = await world.kubectl("delete", "packetcapture", "outage", "--namespace=judged")
        assert deleted.code == 0, deleted.err
    finally:
        for resource in CONFIGURATIONS.values():
            await world.client.delete(resource, "test-webhook")
        await world.configure()
