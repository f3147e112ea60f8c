"""The agent as a program of its own: a real kube-apiserver before it, a real capturer behind it, real packets."""

import json
import os
import signal
from datetime import UTC, datetime, timedelta

from agent.capturer.protocol import State
from api.capturenode import CaptureNode
from api.capturepolicy import Limits
from hack.clusters.ports import free_port
from kube.client import CAPTURENODES, NAMESPACES, PACKETCAPTURES, PODS
from tests.agent import world
from tests.cluster.world import NODE, World, eventually


async def test_a_capture_runs_and_its_files_are_served(cluster: World) -> None:
    uid = await cluster.create_capture("c")
    await cluster.create_pod(labels={"app": "web"})
    waiting = await cluster.waits(uid)
    assert (waiting.pods, waiting.name, waiting.namespace) == (1, "c", cluster.namespace)
    await cluster.send(100)
    capturing = await cluster.reported_as(uid, "Capturing", packets=100)
    assert (capturing.pods, capturing.dropped, capturing.files) == (1, 0, 1)
    (file,) = await cluster.files(uid)
    assert (file["packets"], file["state"], file["pod"], file["node"]) == (100, "Writing", "web-0", NODE)
    content = await cluster.ask(f"{uid}/files/{file['name']}")
    assert len(content) == file["size"] == 24 + 100 * (16 + world.HEADERS + 64)

    node = await cluster.client.get(CAPTURENODES, NODE)
    (owner,) = node["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Node", NODE)
    assert node["status"]["disk"]["capacity"] > 0

    await cluster.client.delete(PACKETCAPTURES, "c", namespace=cluster.namespace)

    async def gone() -> bool:
        return await cluster.reported(uid) is None and not (cluster.capturer.captures / uid).exists()

    await eventually(gone)


async def test_captures_pause_on_a_full_disk_and_go_on_when_there_is_room(cluster: World) -> None:
    uid = await cluster.create_capture("c")
    await cluster.create_pod(labels={"app": "web"})
    await cluster.waits(uid)
    await cluster.send(100)
    await cluster.reported_as(uid, "Capturing", packets=100)
    await cluster.stop_agent()
    cluster.environment["MIN_FREE_BYTES"] = str(1 << 50)  # no disk has that
    await cluster.start_agent()
    pressed = await cluster.reported_as(uid, "Error", "DiskPressure", packets=100)
    assert (pressed.pods, pressed.matched) == (0, 1)
    assert cluster.capturer.report() == ()

    async def emptied() -> bool:
        return await cluster.files(uid) == []

    await eventually(emptied)
    await cluster.stop_agent()
    cluster.environment["MIN_FREE_BYTES"] = "0"
    await cluster.start_agent()
    again = await cluster.reported_as(uid, "Capturing", packets=100)
    assert (again.evicted, again.interruptions) == (1, 1), "the pause found nothing to stop"


async def test_captures_follow_labels_and_the_opt_out(cluster: World) -> None:
    uid = await cluster.create_capture("c")
    await cluster.create_pod(labels={"app": "db"})

    async def relabel(labels: dict[str, str | None]) -> None:
        patch = {"metadata": {"labels": labels}}
        await cluster.client.patch(PODS, "web-0", patch, namespace=cluster.namespace)

    await relabel({"app": "web"})
    await cluster.waits(uid)
    await cluster.send(10)
    await relabel({"app": "db"})
    stopped = await cluster.reported_as(uid, "WaitingForTraffic", "NoPodMatches", packets=10)
    assert (stopped.pods, stopped.files) == (0, 1)
    await cluster.send(10)  # nobody looks
    await relabel({"app": "web", "kubepcap.io/capture": "deny"})
    await cluster.reported_as(uid, "Error", "OptedOut")
    await relabel({"kubepcap.io/capture": None})
    await cluster.reported_as(uid, "Capturing", packets=10)
    await cluster.send(5)
    await cluster.reported_as(uid, "Capturing", packets=15)
    label = {"metadata": {"labels": {"kubepcap.io/capture": "deny"}}}
    await cluster.client.patch(NAMESPACES, cluster.namespace, label)
    await cluster.reported_as(uid, "Error", "OptedOut", packets=15)
    assert sorted(file["packets"] for file in await cluster.files(uid)) == [5, 10]


async def test_a_capture_that_no_one_stamped_or_admitted_takes_nothing(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    unstamped = await cluster.create_capture("unstamped", stamped=False)
    waiting = await cluster.create_capture("waiting", admitted=False)
    admitted = await cluster.create_capture("admitted")
    await cluster.waits(admitted)
    assert await cluster.reported(waiting) is None
    assert await cluster.files(unstamped) == await cluster.files(waiting) == []
    assert {status.target.capture_uid for status in cluster.capturer.report()} == {admitted}


async def test_suspending_and_the_end_time_stop_a_capture_and_keep_its_files(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(3)
    await cluster.change_capture("c", {"suspend": True})
    await cluster.reported_as(uid, "Scheduled", "Suspended", packets=3)
    end = (datetime.now(UTC) + timedelta(seconds=3)).strftime("%Y-%m-%dT%H:%M:%SZ")
    await cluster.change_capture("c", {"suspend": False, "endTime": end})
    await cluster.reported_as(uid, "Finished", "EndTimeReached", packets=3)
    assert [file["state"] for file in await cluster.files(uid)] == ["Finished"] * 2
    assert cluster.capturer.report() == ()


async def test_an_agent_that_is_killed_takes_up_where_it_was(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    gone = await cluster.create_capture("gone")
    await cluster.waits(uid)
    await cluster.waits(gone)
    cluster.process.kill()
    await cluster.process.wait()
    await cluster.send(50)  # the capturer goes on alone
    await cluster.client.delete(PACKETCAPTURES, "gone", namespace=cluster.namespace)
    await cluster.start_agent()
    await cluster.reported_as(uid, "Capturing", packets=50)
    assert [file["packets"] for file in await cluster.files(uid)] == [50]

    async def removed() -> bool:
        return not (cluster.capturer.captures / gone).exists()

    await eventually(removed)


async def test_a_worker_that_is_killed_loses_no_packet_of_before(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(50)
    await cluster.reported_as(uid, "Capturing", packets=50)
    os.kill(cluster.capturer.worker_pid(), signal.SIGKILL)

    async def finished() -> bool:
        return [file["state"] for file in await cluster.files(uid)] == ["Finished", "Writing"]

    await eventually(finished)
    await cluster.send(20)
    again = await cluster.reported_as(uid, "Capturing", packets=70)
    assert [file["packets"] for file in await cluster.files(uid)] == [50, 20]
    assert again.interruptions == 1
    assert again.interrupted_at is not None
    node = CaptureNode.model_validate(await cluster.client.get(CAPTURENODES, NODE))
    assert node.status.capturer is not None
    assert (node.status.capturer.restarts, node.status.capturer.interfaces) == (1, 1)
    shown = await cluster.metrics()
    assert (shown["packets_total"], shown["capturer_restarts_total"], shown["interruptions_total"]) == (70, 1, 1)
    assert (shown["interfaces"], shown["recovered_files_total"], shown["files"]) == (1, 1, 2)
    assert shown["report_writes_total"] > 0


async def test_when_agent_and_worker_are_killed_the_counts_are_those_of_the_files(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c", rotation={"maxFiles": 100, "maxFileSize": "300k"})
    await cluster.waits(uid)
    await cluster.send(1000)
    await cluster.reported_as(uid, "Capturing", packets=1000)
    cluster.process.kill()
    await cluster.process.wait()
    await cluster.send(500)  # nobody tells the agent of these
    await eventually(cluster.flushed)
    os.kill(cluster.capturer.worker_pid(), signal.SIGKILL)
    cluster.capturer.read_to_end()
    cluster.capturer.connect()
    await cluster.start_agent()
    await cluster.captures(1)
    found = await cluster.reported_as(uid, "Capturing", packets=1500)
    files = await cluster.files(uid)
    assert sum(file["packets"] for file in files) == 1500
    assert found.interruptions == 1
    await cluster.stop_agent()
    await cluster.start_agent()
    await cluster.captures(1)
    await cluster.send(7)
    again = await cluster.reported_as(uid, "Capturing", packets=1507)
    assert again.interruptions == 2, "an agent that ends stops its captures"


async def test_a_second_agent_of_the_node_does_nothing_until_the_first_is_gone(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    first = cluster.process
    cluster.environment |= {"HEALTH_PORT": str(free_port()), "PORT": str(free_port()), "POD_NAME": "agent-2"}
    await cluster.start_agent()

    async def refused() -> bool:
        return (await cluster.ask_health("readyz")).startswith("node: another agent is at work on this node")

    await eventually(refused)
    node = await cluster.client.get(CAPTURENODES, NODE)
    assert node["status"]["pod"] == "agent-1"
    first.kill()
    await first.wait()

    async def taken_over() -> bool:
        node = await cluster.client.get(CAPTURENODES, NODE)
        return bool(node["status"]["pod"] == "agent-2")

    await eventually(taken_over)
    await cluster.send(3)
    assert (await cluster.reported_as(uid, "Capturing", packets=3)).interruptions == 0


async def test_an_end_that_moves_restarts_nothing_and_one_that_passed_unseen_is_kept(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    soon, later = (
        (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ") for seconds in (3, 600)
    )
    uid = await cluster.create_capture("c", endTime=soon)
    await cluster.waits(uid)
    await cluster.change_capture("c", {"endTime": later})

    async def passed() -> bool:
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") > soon

    await eventually(passed)
    await cluster.send(5)
    await cluster.reported_as(uid, "Capturing", packets=5)
    soon = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    await cluster.change_capture("c", {"endTime": soon})

    async def moved() -> bool:
        return [status.target.until for status in cluster.capturer.report()] == [
            datetime.fromisoformat(soon).timestamp()
        ]

    await eventually(moved)
    cluster.process.kill()
    await cluster.process.wait()

    async def ended() -> bool:
        return [status.state for status in cluster.capturer.report()] == [State.STOPPED]

    await eventually(ended)  # with no agent there
    await cluster.send(5)
    await cluster.start_agent()
    found = await cluster.reported_as(uid, "Finished", "EndTimeReached", packets=5)
    assert found.interruptions == 0
    assert [(file["packets"], file["state"]) for file in await cluster.files(uid)] == [(5, "Finished")]


async def test_over_its_policys_limit_a_capture_loses_its_oldest_files_and_no_other_does(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    cluster.limits = Limits(max_bytes_per_node=50_000)
    small = await cluster.create_capture("small", rotation={"maxFiles": 100, "maxFileSize": "10k"}, snapLength=256)
    cluster.limits = Limits()
    other = await cluster.create_capture("other", rotation={"maxFiles": 100, "maxFileSize": "10k"}, snapLength=256)
    await cluster.waits(small)
    await cluster.waits(other)
    await cluster.send(1000)

    async def evicted() -> bool:
        found = await cluster.reported(small)
        return found is not None and found.packets == 1000 and found.evicted > 0

    await eventually(evicted)

    async def within() -> bool:
        return bool(sum(file["size"] for file in await cluster.files(small)) <= 50_000)

    await eventually(within)
    assert (await cluster.reported_as(small, "Capturing", packets=1000)).pods == 1
    assert (await cluster.reported_as(other, "Capturing", packets=1000)).evicted == 0
    assert sum(file["packets"] for file in await cluster.files(other)) == 1000


async def test_a_filter_that_lets_nothing_through_is_told_with_what_was_seen(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c", filters=[{"protocol": "TCP", "ports": [1]}])
    await cluster.waits(uid)
    await cluster.send(100)

    async def told() -> bool:
        found = await cluster.reported(uid)
        return found is not None and found.reason == "FilterMatchedNothing" and found.seen >= 100

    await eventually(told)
    found = await cluster.reported(uid)
    assert found is not None
    assert found.message == f"filter matched 0 of {found.seen:,} packets seen on 1 pod"


async def test_an_agent_that_ends_leaves_finished_files_with_their_hashes(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(7)
    assert await cluster.stop_agent() == 0
    (record,) = (cluster.capturer.captures / uid).glob("*.pcap.json")
    written = json.loads(record.read_text())
    assert (written["packets"], written["recovered"], len(written["sha256"])) == (7, False, 64)
    await cluster.start_agent()

    await cluster.captures(1)
    await cluster.send(2)
    again = await cluster.reported_as(uid, "Capturing", packets=9)
    assert again.interruptions == 1


async def test_a_pod_that_ends_as_a_whole_leaves_finished_files_too(cluster: World) -> None:
    await cluster.create_pod(labels={"app": "web"})
    uid = await cluster.create_capture("c")
    await cluster.waits(uid)
    await cluster.send(7)
    cluster.capturer.process.terminate()  # kubelet ends both containers at once
    assert await cluster.stop_agent() == 0
    (record,) = (cluster.capturer.captures / uid).glob("*.pcap.json")
    written = json.loads(record.read_text())
    assert (written["packets"], written["recovered"], len(written["sha256"])) == (7, False, 64)
