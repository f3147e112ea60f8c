"""The controller and the webhook as programs, with the rights that the manifests give them, on a real kube-apiserver.

The manifests are applied as they are; only the webhook's Service leads to loopback. Pods are objects without a kubelet,
but their tokens are real: the signer sees of them what it sees in a cluster.
"""

import asyncio
import base64
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from api.object import format_timestamp
from api.packetcapture import PacketCapture
from controller.authority import CertificateAuthority
from controller.bundles import write_authorities
from controller.events import Transition, event
from controller.leadership import Timing
from hack.clusters.bare import bare_control_plane
from hack.clusters.ports import free_port
from kube.certificates import signing_request
from kube.client import (
    APISERVICES,
    CAPTURENODES,
    CAPTUREPOLICIES,
    CERTIFICATESIGNINGREQUESTS,
    CONFIGMAPS,
    EVENTS,
    LEASES,
    MUTATINGWEBHOOKCONFIGURATIONS,
    NAMESPACES,
    NODES,
    PACKETCAPTURES,
    SECRETS,
    VALIDATINGWEBHOOKCONFIGURATIONS,
    Client,
    Json,
    Resource,
)
from kube.status import StatusError
from tests.cluster.installation import Installation, Program, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEBHOOKS = (MUTATINGWEBHOOKCONFIGURATIONS, VALIDATINGWEBHOOKCONFIGURATIONS)


@dataclass
class World(Installation):
    controllers: dict[str, Program] = field(default_factory=dict)

    async def capture(self, name: str, *, namespace: str = "dev", **spec: Any) -> PacketCapture:
        return PacketCapture.model_validate(await self.create(name, namespace=namespace, **spec))

    async def create(self, name: str, *, namespace: str = "dev", **spec: Any) -> Json:
        return await self.client.create(
            PACKETCAPTURES,
            {
                "apiVersion": "kubepcap.io/v1",
                "kind": "PacketCapture",
                "metadata": {"name": name},
                "spec": {"selector": 'app == "web"'} | spec,
            },
            namespace=namespace,
        )

    async def captures(self, *, namespace: str) -> list[PacketCapture]:
        listed = await self.client.list(PACKETCAPTURES, namespace=namespace)
        return [PacketCapture.model_validate(item) for item in listed.items]

    async def reason(self, name: str, kind: str = "Admitted", *, namespace: str = "dev") -> str:
        """That of the condition; empty while there is none."""
        capture = PacketCapture.model_validate(await self.client.get(PACKETCAPTURES, name, namespace=namespace))
        condition = capture.status.condition(kind)
        return condition.reason if condition is not None else ""

    async def becomes(self, name: str, reason: str, kind: str = "Admitted", *, namespace: str = "dev") -> PacketCapture:
        async def there() -> bool:
            return await self.reason(name, kind, namespace=namespace) == reason

        await eventually(there)
        return PacketCapture.model_validate(await self.client.get(PACKETCAPTURES, name, namespace=namespace))

    async def stop_controller(self, pod: str) -> None:
        await self.controllers[pod].stop()

    async def leader(self) -> str:
        try:
            lease = await self.client.get(LEASES, "kubepcap-controller", namespace="kubepcap")
        except StatusError:
            return ""
        return str(lease["spec"].get("holderIdentity") or "")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("controller")
    async with AsyncExitStack() as stack:
        # Its own: a webhook on every PacketCapture would stand in the way of other tests.
        plane = stack.enter_context(bare_control_plane(tmp_path_factory.mktemp("control-plane")))
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=plane.kubeconfig))
        world = World(plane, client, directory, ports={"kubepcap-webhook": free_port()})
        await world.apply_manifests()
        await client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}})
        for namespace in ("dev", "crowded"):
            await client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        for number in range(2):
            pod = f"controller-{number}"
            world.controllers[pod] = await start_controller(world, pod)
            stack.push_async_callback(world.stop_controller, pod)
        pod = await world.add_pod("kubepcap-webhook", "ReplicaSet", "kubepcap-webhook-5d9c7b8f6")
        kubeconfig = await world.kubeconfig_of("kubepcap-webhook", pod)
        port = str(world.ports["kubepcap-webhook"])
        webhook = await world.start("webhook", pod, kubeconfig, PORT=port, DRAIN_SECONDS="0")
        stack.push_async_callback(webhook.stop)
        yield world


async def start_controller(world: World, pod: str) -> Program:
    return await world.start("controller", pod, world.controller_kubeconfig(), COUNTERS_INTERVAL_SECONDS="1")


async def bundle(world: World) -> str:
    try:
        found = await world.client.get(CONFIGMAPS, "kubepcap-ca", namespace="kubepcap")
    except StatusError:
        return ""
    return str(found["data"]["ca.crt"])


async def ready(world: World) -> None:
    """Until the webhook has its certificate and kube-apiserver knows how to reach it."""

    async def answered() -> bool:
        try:
            await world.capture("probe")
        except StatusError:
            return False
        return True

    await eventually(answered)
    await world.client.delete(PACKETCAPTURES, "probe", namespace="dev")


async def test_a_capture_is_admitted_through_certificates_that_nobody_made_by_hand(world: World) -> None:
    await ready(world)
    capture = await world.capture("first")
    assert capture.metadata.annotations["kubepcap.io/admission"]
    admitted = await world.becomes("first", "WithinLimit")
    assert admitted.status.phase == "Scheduled"
    assert await world.reason("first", "Capturing") == "NoAgent"


async def test_the_shipped_policy_is_created(world: World) -> None:
    await ready(world)
    assert await world.client.get(CAPTUREPOLICIES, "baseline")


async def test_the_bundle_and_the_path_are_put_where_kube_apiserver_looks_and_put_back(world: World) -> None:
    await ready(world)

    async def trusts(resource: Resource, name: str) -> bool:
        found = await world.client.get(resource, name)
        given = [found["spec"]] if resource is APISERVICES else [one["clientConfig"] for one in found["webhooks"]]
        published = await bundle(world)
        return all(base64.b64decode(one.get("caBundle") or "").decode() == published for one in given)

    async def all_trust() -> bool:
        trusting = [(APISERVICES, "v1.subresources.kubepcap.io"), *((resource, "kubepcap") for resource in WEBHOOKS)]
        return bool(await bundle(world)) and all([await trusts(*one) for one in trusting])

    await eventually(all_trust)
    secret = await world.client.get(SECRETS, "kubepcap-webhook-path", namespace="kubepcap")
    path = base64.b64decode(secret["data"]["path"]).decode()
    for resource, half in zip(WEBHOOKS, ("stamp", "judge"), strict=True):
        (webhook,) = (await world.client.get(resource, "kubepcap"))["webhooks"]
        assert webhook["clientConfig"]["service"]["path"] == f"/{half}/{path}"

    before = await bundle(world)
    await world.client.delete(CONFIGMAPS, "kubepcap-ca", namespace="kubepcap")
    await world.client.delete(SECRETS, "kubepcap-ca", namespace="kubepcap")
    spec = {"caBundle": None}
    await world.client.patch(APISERVICES, "v1.subresources.kubepcap.io", {"spec": spec})
    await eventually(all_trust)
    assert await bundle(world) == before
    assert await world.client.get(SECRETS, "kubepcap-ca", namespace="kubepcap")


async def test_a_ca_is_withdrawn_when_it_is_taken_out_of_the_secret(world: World) -> None:
    """The Secret alone is changed, so it is followed. The CA is a further one: the webhook needs that which signed."""
    await ready(world)
    further = CertificateAuthority.create(datetime.now(UTC))

    async def is_published() -> bool:
        bundle = await world.client.get(CONFIGMAPS, "kubepcap-ca", namespace="kubepcap")
        return further.certificate_pem.decode() in bundle["data"]["ca.crt"]

    async def is_withdrawn() -> bool:
        return not await is_published()

    added = write_authorities({further.name: further})
    encoded = {key: base64.b64encode(value).decode() for key, value in added.items()}
    await world.client.patch(SECRETS, "kubepcap-ca", {"data": encoded}, namespace="kubepcap")
    await eventually(is_published)
    await world.client.patch(SECRETS, "kubepcap-ca", {"data": dict.fromkeys(encoded)}, namespace="kubepcap")
    await eventually(is_withdrawn)
    secret = await world.client.get(SECRETS, "kubepcap-ca", namespace="kubepcap")
    assert secret["data"]
    assert not encoded.keys() & secret["data"].keys()


async def test_requests_are_signed_owned_by_our_namespace_and_carry_what_was_checked(world: World) -> None:
    await ready(world)
    listed = await world.client.list(CERTIFICATESIGNINGREQUESTS, field_selector="spec.signerName=kubepcap.io/serving")
    (issued,) = [item for item in listed.items if item["metadata"]["name"].startswith("kubepcap-webhook-")]
    namespace = await world.client.get(NAMESPACES, "kubepcap")
    assert [owner["uid"] for owner in issued["metadata"]["ownerReferences"]] == [namespace["metadata"]["uid"]]

    certificate = x509.load_pem_x509_certificate(base64.b64decode(issued["status"]["certificate"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["kubepcap-webhook.kubepcap.svc"]


async def demanded(client: Client, name: str, common_name: str, dns_name: str) -> Json:

    request = signing_request(ec.generate_private_key(ec.SECP256R1()), common_name, [dns_name])
    return await client.create(
        CERTIFICATESIGNINGREQUESTS,
        {
            "apiVersion": CERTIFICATESIGNINGREQUESTS.api_version,
            "kind": CERTIFICATESIGNINGREQUESTS.kind,
            "metadata": {"name": name},
            "spec": {
                "signerName": "kubepcap.io/serving",
                "usages": ["digital signature", "server auth"],
                "request": base64.b64encode(request).decode(),
            },
        },
    )


async def test_a_node_gets_its_own_name_and_no_other(world: World) -> None:
    await ready(world)
    pod = await world.add_pod("kubepcap-agent", "DaemonSet", "kubepcap-agent")
    kubeconfig = await world.kubeconfig_of("kubepcap-agent", pod)

    async def answer(name: str) -> tuple[str, str]:
        status = (await world.client.get(CERTIFICATESIGNINGREQUESTS, name)).get("status") or {}
        for condition in status.get("conditions") or []:
            if condition["type"] == "Denied" or status.get("certificate"):
                return condition["type"], condition["reason"]
        return "", ""

    async with Client.connect(user_agent="test", kubeconfig=kubeconfig) as agent:
        await demanded(agent, "own", "kubepcap-agent", "node-a.agent.kubepcap")
        await demanded(agent, "foreign", "kubepcap-agent", "node-b.agent.kubepcap")
    await demanded(world.client, "admin", "kubepcap-agent", "node-a.agent.kubepcap")
    for name, expected in {
        "own": ("Approved", "ProfileFits"),
        "foreign": ("Denied", "NamesWrong"),
        "admin": ("Denied", "RequesterUnknown"),
    }.items():

        async def answered(name: str = name) -> bool:
            return (await answer(name))[0] != ""

        await eventually(answered)
        assert await answer(name) == expected


async def test_what_nodes_report_becomes_the_status(world: World) -> None:
    await ready(world)
    capture = await world.capture("reported")
    await world.client.create(
        CAPTURENODES, {"apiVersion": "kubepcap.io/v1", "kind": "CaptureNode", "metadata": {"name": "node-a"}}
    )

    async def report(**said: Any) -> None:
        about = {"namespace": "dev", "name": "reported", "uid": capture.metadata.uid}
        status = {"heartbeatTime": format_timestamp(datetime.now(UTC)), "reports": [json.dumps(about | said)]}
        await world.client.patch(CAPTURENODES, "node-a", {"status": status})

    await report(state="WaitingForTraffic", pods=1)
    waiting = await world.becomes("reported", "NoPacketYet", "Capturing")
    assert (waiting.status.phase, waiting.status.pods) == ("WaitingForTraffic", 1)
    await report(state="Capturing", pods=1, packets=3, bytes=300, dropped=1)
    capturing = await world.becomes("reported", "Capturing", "Capturing")
    assert (capturing.status.phase, capturing.status.packets, capturing.status.dropped) == ("Capturing", 3, 1)
    await report(state="Capturing", pods=1, packets=9, bytes=900, dropped=1)

    async def counted() -> bool:
        found = PacketCapture.model_validate(await world.client.get(PACKETCAPTURES, "reported", namespace="dev"))
        return found.status.packets == 9

    await eventually(counted)


async def test_a_node_that_lies_spoils_neither_the_status_nor_other_captures(world: World) -> None:
    await ready(world)
    victim, other = await world.capture("victim"), await world.capture("other")

    def said(capture: PacketCapture, **changes: Any) -> str:
        metadata = capture.metadata
        about = {"namespace": metadata.namespace, "name": metadata.name, "uid": metadata.uid, "state": "Capturing"}
        return json.dumps(about | changes)

    lies = [
        said(victim, packets=10**19),
        said(other, packets=3, pods=1, message="\x1b[31m\nred"),
        said(other, name="victim", packets=7),
    ]
    status = {"heartbeatTime": format_timestamp(datetime.now(UTC)), "reports": lies[:2]}
    body = {"apiVersion": "kubepcap.io/v1", "kind": "CaptureNode", "metadata": {"name": "liar"}, "status": status}
    await world.client.create(CAPTURENODES, body)
    troubled = await world.becomes("victim", "ReportUnreadable", "Degraded")
    assert await world.reason("victim") == "WithinLimit"
    assert troubled.status.packets == 0
    counted = await world.becomes("other", "Capturing", "Capturing")
    assert (counted.status.packets, counted.status.nodes[0].message) == (3, "\ufffd[31m\ufffdred")
    await world.client.patch(CAPTURENODES, "liar", {"status": {"reports": lies[2:]}})
    alone = await world.becomes("other", "NoPodMatches", "Capturing")
    assert alone.status.packets == 0
    await world.client.delete(CAPTURENODES, "liar")


async def test_each_change_is_told_once_whatever_the_number_of_nodes(world: World) -> None:
    await ready(world)
    capture = await world.capture("told")
    names = [f"teller-{number}" for number in range(3)]
    for name in names:
        body = {"apiVersion": "kubepcap.io/v1", "kind": "CaptureNode", "metadata": {"name": name}}
        await world.client.create(CAPTURENODES, body)

    async def report(told_by: list[str], **said: Any) -> None:
        about = {"namespace": "dev", "name": "told", "uid": capture.metadata.uid}
        status = {"heartbeatTime": format_timestamp(datetime.now(UTC)), "reports": [json.dumps(about | said)]}
        await asyncio.gather(*(world.client.patch(CAPTURENODES, name, {"status": status}) for name in told_by))

    async def summed(reason: str, pods: int) -> None:
        async def there() -> bool:
            found = await world.client.get(PACKETCAPTURES, "told", namespace="dev")
            status = PacketCapture.model_validate(found).status
            degraded = status.condition("Degraded")
            return status.pods == pods and degraded is not None and degraded.reason == reason

        await eventually(there)

    await report(names, state="Capturing", pods=1, matched=1, packets=5)
    await summed("AsExpected", 3)
    full = {"state": "Error", "reason": "DiskPressure", "message": "90 MB are free and 100 MB must be"}
    await report(names, matched=1, packets=5, **full)
    await summed("DiskPressure", 0)
    await report(names[:1], state="Capturing", pods=1, matched=1, packets=6, interruptions=1)
    await report(names[1:], state="Capturing", pods=1, matched=1, packets=6)
    await summed("AsExpected", 3)
    await world.client.patch(PACKETCAPTURES, "told", {"spec": {"suspend": True}}, namespace="dev")
    await world.becomes("told", "Suspended")

    selector = f"regarding.uid={capture.metadata.uid}"

    async def events() -> list[Json] | None:
        told = (await world.client.list(EVENTS, namespace="dev", field_selector=selector)).items
        return told if "Suspended" in [event["reason"] for event in told] else None

    told = await eventually(events)
    assert sorted(event["reason"] for event in told) == [
        "DiskHasRoom",
        "DiskPressure",
        "Interrupted",
        "Started",
        "Suspended",
    ]
    (started,) = [event for event in told if event["reason"] == "Started"]
    assert started["note"].endswith("policy baseline")
    assert started["reportingController"] == "kubepcap.io/controller"
    kubectl = [str(world.plane.kubectl), f"--kubeconfig={world.plane.kubeconfig}", "--namespace=dev"]
    described = await asyncio.to_thread(
        subprocess.run, [*kubectl, "describe", "packetcapture", "told"], check=True, capture_output=True, text=True
    )
    assert "90 MB are free and 100 MB must be" in described.stdout
    for name in names:
        await world.client.delete(CAPTURENODES, name)
    await world.becomes("told", "NodeGone", "Complete")

    async def none_left() -> bool:
        found = await world.client.get(PACKETCAPTURES, "told", namespace="dev")
        return not PacketCapture.model_validate(found).status.nodes

    await eventually(none_left)


async def test_kube_apiserver_takes_the_longest_event(world: World) -> None:
    capture = await world.capture("wordy")
    for character in ("x", "é", "🦈"):
        told = Transition("Warning", "R" * 200, "Capturing", character * 2000)
        body = event(capture.metadata, told, instance="test", now=datetime.now(UTC))
        made = await world.client.create(EVENTS, body, namespace="dev")
        assert made["note"] == body["note"]


async def test_a_capture_that_is_over_runs_again_when_its_end_is_moved(world: World) -> None:
    await ready(world)
    soon = format_timestamp(datetime.now(UTC) + timedelta(seconds=2))
    await world.capture("again", endTime=soon)
    await world.becomes("again", "Ended")
    later = format_timestamp(datetime.now(UTC) + timedelta(minutes=5))
    await world.client.patch(PACKETCAPTURES, "again", {"spec": {"endTime": later}}, namespace="dev")
    running = await world.becomes("again", "WithinLimit")
    assert running.status.finished_time is None
    assert running.status.phase != "Finished"


async def test_of_fifty_captures_at_once_exactly_as_many_as_allowed_are_admitted(world: World) -> None:
    await ready(world)
    await world.client.create(
        CAPTUREPOLICIES,
        {
            "apiVersion": "kubepcap.io/v1",
            "kind": "CapturePolicy",
            "metadata": {"name": "a-five"},  # the first by name is taken
            "spec": {"limits": {"maxCapturesPerNamespace": 5}},
        },
    )

    async def judged() -> bool:
        capture = await world.capture("first", namespace="crowded")
        await world.client.delete(PACKETCAPTURES, "first", namespace="crowded")
        return '"a-five"' in capture.metadata.annotations["kubepcap.io/admission"]

    await eventually(judged)
    await asyncio.gather(*(world.capture(f"c{number}", namespace="crowded") for number in range(50)))

    async def reasons() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for capture in await world.captures(namespace="crowded"):
            admitted = capture.status.condition("Admitted")
            found.setdefault(admitted.reason if admitted else "", []).append(capture.metadata.name)
        # At no moment more than allowed, whatever else is not decided yet.
        assert len(found.get("WithinLimit", [])) <= 5
        return found

    async def all_decided() -> dict[str, list[str]] | None:
        found = await reasons()
        return found if "" not in found else None

    decided = await eventually(all_decided)
    assert {reason: len(names) for reason, names in decided.items()} == {"WithinLimit": 5, "QuotaExceeded": 45}
    await world.client.delete(PACKETCAPTURES, decided["WithinLimit"][0], namespace="crowded")

    async def moved_up() -> bool:
        found = await reasons()
        return len(found["WithinLimit"]) == 5 and len(found["QuotaExceeded"]) == 44

    await eventually(moved_up)
    await world.client.delete(CAPTUREPOLICIES, "a-five")


async def test_a_capture_goes_some_time_after_its_end(world: World) -> None:
    await ready(world)
    end = format_timestamp(datetime.now(UTC) + timedelta(seconds=3))
    await world.capture("brief", endTime=end, ttlSecondsAfterFinished=2)
    finished = await world.becomes("brief", "Ended")
    assert finished.status.phase == "Finished"
    assert finished.status.finished_time is not None

    async def gone() -> bool:
        return "brief" not in [capture.metadata.name for capture in await world.captures(namespace="dev")]

    await eventually(gone)


async def test_what_was_created_without_the_webhook_says_why_nothing_comes(world: World) -> None:
    await ready(world)
    removed = [(resource, await world.client.get(resource, "kubepcap")) for resource in WEBHOOKS]
    for resource, _ in removed:
        await world.client.delete(resource, "kubepcap")

    async def unstamped() -> bool:
        with suppress(StatusError):
            await world.client.delete(PACKETCAPTURES, "unguarded", namespace="dev")
        capture = await world.capture("unguarded")
        return "kubepcap.io/admission" not in capture.metadata.annotations

    await eventually(unstamped)
    told = await world.becomes("unguarded", "NotStamped")
    assert told.status.phase == "Error"

    await world.create("nonsense", selector="app ==")

    async def status() -> Json | None:
        return (await world.client.get(PACKETCAPTURES, "nonsense", namespace="dev")).get("status")

    nonsense = await eventually(status)
    assert nonsense["phase"] == "Error"
    assert "selector" in nonsense["conditions"][0]["message"]
    for resource, configuration in removed:
        (webhook,) = configuration["webhooks"]
        webhook["clientConfig"] = {"service": webhook["clientConfig"]["service"] | {"path": None}}
        await world.client.create(
            resource,
            {
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "metadata": {"name": "kubepcap"},
                "webhooks": [webhook],
            },
        )
    await ready(world)


async def test_when_the_leader_stops_the_other_goes_on(world: World) -> None:
    await ready(world)
    leader = await world.leader()
    assert await world.controllers[leader].stop() == 0
    (other,) = world.controllers.keys() - {leader}

    async def taken_over() -> bool:
        return await world.leader() == other

    await eventually(taken_over)
    await world.capture("later")
    await world.becomes("later", "WithinLimit")


async def test_when_the_leader_is_killed_the_next_takes_over_within_the_lease_time(world: World) -> None:
    await ready(world)
    leader = await world.leader()
    (other,) = world.controllers.keys() - {leader}
    if world.controllers[other].process.returncode is not None:
        world.controllers[other] = await start_controller(world, other)

    await eventually(world.controllers[other].is_up)
    assert await world.controllers[leader].stop(signal.SIGKILL) == -signal.SIGKILL

    async def taken_over() -> bool:
        return await world.leader() == other

    timing = Timing()
    await eventually(taken_over, patience=timing.lease + 3 * timing.retry)
    await world.capture("after-the-kill")
    await world.becomes("after-the-kill", "WithinLimit")


async def test_the_leader_renews_its_lease_ahead_of_other_requests(world: World) -> None:
    kubectl = [str(world.plane.kubectl), f"--kubeconfig={world.plane.kubeconfig}", "get", "--raw=/metrics"]
    served = 'apiserver_flowcontrol_dispatched_requests_total{flow_schema="kubepcap-leader-election"'

    async def renewed() -> bool:
        metrics = await asyncio.to_thread(subprocess.run, kubectl, check=True, capture_output=True, text=True)
        return any(
            line.startswith(served) and 'priority_level="leader-election"' in line
            for line in metrics.stdout.splitlines()
        )

    await eventually(renewed)


async def test_no_program_asked_for_more_than_it_may(world: World) -> None:
    """After all of the above: the rights in the manifests are enough."""
    for log in sorted(world.directory.glob("*.log")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines
        refused = [line["message"] for line in lines if "forbidden" in line["message"]]
        assert not refused, f"{log.name}: {refused}"
        assert not [line for line in lines if "exception" in line]
