"""What becomes of a captured pod: interfaces that come and go, processes that end, ends that move."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.capturer.protocol import InterfaceStatus, Start, State, TargetStatus, encode
from agent.capturer.supervisor import open_captures
from agent.capturer.target import MOST_INTERFACES
from agent.capturer.worker import Worker, longest_wait
from tests.agent.world import HOST, Capturer, Pod, eventually, run, send


def add_interface(pod: Pod, name: str, *, network: str = "10.203.0") -> None:
    """Give the pod another interface, whose other end is `<name>-peer` in the peer's namespace."""
    other = f"{name}-peer"
    run("ip", "link", "add", name, "netns", pod.namespace, "type", "veth", "peer", "name", other, "netns", pod.peer)
    for inside, link, address in ((pod.namespace, name, f"{network}.2/24"), (pod.peer, other, f"{network}.1/24")):
        run("ip", "-n", inside, "addr", "add", address, "dev", link)
        run("ip", "-n", inside, "link", "set", link, "up")


def remove_interface(pod: Pod, name: str) -> None:
    run("ip", "-n", pod.namespace, "link", "del", name)


def interface(status: TargetStatus, name: str) -> InterfaceStatus:
    (found,) = (interface for interface in status.interfaces if interface.interface == name)
    return found


def captured(capturer: Capturer) -> dict[str, State]:
    (status,) = capturer.report()
    return {interface.interface: interface.state for interface in status.interfaces}


class TestInterfaces:
    def test_one_that_comes_later_is_captured_too(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        capturer.start(target)
        add_interface(pod, "net1")
        eventually(lambda: captured(capturer) == {"eth0": State.CAPTURING, "net1": State.CAPTURING})
        pod.in_peer(lambda: send("10.203.0.2", count=30))
        pod.receive(20)
        status = capturer.stop(target)
        assert (interface(status, "net1").packets, interface(status, "eth0").packets) == (30, 20)

    def test_one_that_is_not_asked_for_is_not(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(interfaces=("eth0",))
        capturer.start(target)
        add_interface(pod, "net1")
        add_interface(pod, "net2", network="10.204.0")
        pod.receive(1)
        assert [interface.interface for interface in capturer.stop(target).interfaces] == ["eth0"]

    def test_one_that_is_asked_for_and_not_there_is_waited_for(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(interfaces=("eth0", "net1"))
        status = capturer.start(target)
        assert (status.state, status.reason) == (State.CAPTURING, "InterfaceNotFound")
        assert "net1" in status.message
        add_interface(pod, "net1")
        eventually(lambda: "net1" in captured(capturer))
        (status,) = capturer.report()
        assert (status.state, status.reason) == (State.CAPTURING, "")

    def test_one_that_goes_ends_alone_and_goes_on_when_it_is_back(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(max_files=10)
        add_interface(pod, "net1")
        capturer.start(target)
        pod.in_peer(lambda: send("10.203.0.2", count=30))
        remove_interface(pod, "net1")
        eventually(lambda: captured(capturer) == {"eth0": State.CAPTURING, "net1": State.FAILED})
        (status,) = capturer.report()
        assert (status.state, status.reason) == (State.CAPTURING, "InterfaceFailed")
        assert interface(status, "net1").packets == 30 <= interface(status, "net1").seen
        pod.receive(20)
        add_interface(pod, "net1")
        eventually(lambda: captured(capturer) == {"eth0": State.CAPTURING, "net1": State.CAPTURING})
        pod.in_peer(lambda: send("10.203.0.2", count=5))
        status = capturer.stop(target)
        assert (status.state, status.reason) == (State.STOPPED, "")
        net1 = interface(status, "net1")
        assert (net1.packets, net1.dropped) == (35, 0)
        assert net1.seen >= 35
        assert [file.packets for file in net1.files] == [30, 5]
        assert interface(status, "eth0").packets == 20

    def test_one_that_is_made_anew_at_once_loses_nothing_of_before(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(max_files=10)
        add_interface(pod, "net1")
        capturer.start(target)
        for _ in range(3):
            pod.in_peer(lambda: send("10.203.0.2", count=30))
            # In one process, so that the capturer finds the second before it knows that the first is gone.
            change = f"""link del net1
                link add net1 type veth peer name net1-peer
                addr add 10.203.0.2/24 dev net1
                link set net1 up
                link set net1-peer netns {pod.peer}"""
            subprocess.run(["ip", "-n", pod.namespace, "-batch", "-"], input=change, text=True, check=True)
            run("ip", "-n", pod.peer, "addr", "add", "10.203.0.1/24", "dev", "net1-peer")
            run("ip", "-n", pod.peer, "link", "set", "net1-peer", "up")
            eventually(lambda: captured(capturer) == {"eth0": State.CAPTURING, "net1": State.CAPTURING})
        status = capturer.stop(target)
        net1 = interface(status, "net1")
        assert (net1.packets, net1.dropped) == (90, 0)
        assert [file.packets for file in net1.files if file.packets] == [30, 30, 30]
        assert not any(file.open for file in net1.files)

    def test_one_that_is_renamed_is_captured_under_its_new_name_only(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        add_interface(pod, "net1")
        capturer.start(target)
        pod.in_peer(lambda: send("10.203.0.2", count=30))
        for change in (
            "set net1 down",
            "set net1 name moved",
            "set moved up",
            "add net1 type veth peer name other",
            "set net1 up",
            "set other up",
        ):
            run("ip", "-n", pod.namespace, "link", *change.split())
        everything = dict.fromkeys(("eth0", "moved", "net1", "other"), State.CAPTURING)
        eventually(lambda: captured(capturer) == everything)
        threads = os.listdir(f"/proc/{capturer.worker_pid()}/task")
        assert len(threads) == 2 + len(everything), "the main one, the target's, one for each interface"
        pod.in_peer(lambda: send("10.203.0.2", count=5))
        status = capturer.stop(target)
        assert (status.state, interface(status, "net1").packets, interface(status, "moved").packets) == (
            State.STOPPED,
            30,
            5,
        )
        assert len(os.listdir(f"/proc/{capturer.worker_pid()}/task")) == 1

    def test_two_whose_files_would_have_the_same_names_are_not_captured_both(
        self, pod: Pod, capturer: Capturer
    ) -> None:
        target = pod.target(max_files=1)
        add_interface(pod, "net_1")
        capturer.start(target)
        pod.in_peer(lambda: send("10.203.0.2", count=30))
        add_interface(pod, "net=1", network="10.204.0")
        eventually(lambda: captured(capturer).get("net=1") is State.FAILED)
        (status,) = capturer.report()
        assert (status.state, status.reason) == (State.CAPTURING, "InterfaceNameTaken")
        pod.in_peer(lambda: send("10.204.0.2", count=5))
        status = capturer.stop(target)
        assert (interface(status, "net_1").packets, interface(status, "net=1").packets) == (30, 0)
        (file,) = interface(status, "net_1").files
        assert file.name in {path.name for path in capturer.files(target)}

    def test_one_whose_name_is_not_utf8_is_captured_too(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        capturer.start(target)
        add_interface(pod, os.fsdecode(b"net\xff"))
        eventually(lambda: captured(capturer) == {"eth0": State.CAPTURING, "net\\xff": State.CAPTURING})
        pod.in_peer(lambda: send("10.203.0.2", count=30))
        status = capturer.stop(target)
        assert (status.state, interface(status, "net\\xff").packets) == (State.STOPPED, 30)

    def test_no_more_than_sixteen_are_captured(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(ring_bytes=1 << 19)
        capturer.start(target)
        names = [f"d{number}" for number in range(10)]
        lines = [f"link add {name} type veth peer name {name}p\nlink set {name} up" for name in names]
        lines += [f"link set {name}p up" for name in names]
        subprocess.run(["ip", "-n", pod.namespace, "-batch", "-"], input="\n".join(lines), text=True, check=True)

        def too_many() -> bool:
            (status,) = capturer.report()
            return (status.state, status.reason) == (State.CAPTURING, "TooManyInterfaces")

        eventually(too_many)
        assert len(captured(capturer)) == MOST_INTERFACES == 16
        assert captured(capturer)["eth0"] is State.CAPTURING
        capturer.stop(target)

    def test_one_that_goes_down_and_up_again_is_captured_on(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        add_interface(pod, "net1")
        capturer.start(target)
        pod.in_peer(lambda: send("10.203.0.2", count=30))
        for direction in ("down", "up"):
            run("ip", "-n", pod.namespace, "link", "set", "net1", direction)
        eventually(lambda: captured(capturer) == {"eth0": State.CAPTURING, "net1": State.CAPTURING})
        pod.in_peer(lambda: send("10.203.0.2", count=5))
        assert interface(capturer.stop(target), "net1").packets == 35

    def test_all_that_went_in_and_out_is_seen_whether_or_not_the_filter_lets_it_through(
        self, pod: Pod, capturer: Capturer
    ) -> None:
        target = pod.target(filter="tcp port 1")
        capturer.start(target)
        pod.receive(100)
        (status,) = capturer.report()
        assert interface(status, "eth0").packets == 0
        seen = interface(status, "eth0").seen
        assert seen >= 100
        pod.in_pod(lambda: send("10.201.0.1", count=50))
        assert interface(capturer.stop(target), "eth0").seen >= seen + 50


class TestPods:
    def test_a_pod_that_is_gone_ends_its_capture_and_lets_the_namespace_go(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        capturer.start(target)
        pod.receive(10)
        pod.process.kill()
        status = capturer.next_state(State.FAILED)
        assert status.reason == "PodGone"
        assert packets(capturer) == 10
        links = [os.readlink(entry) for entry in Path(f"/proc/{capturer.worker_pid()}/fd").iterdir()]
        assert not [link for link in links if link.startswith("net:") or "pidfd" in link or "pcap" in link]
        assert len([link for link in links if "socket" in link]) == 4  # the listener, this connection, the wake-up pair

    def test_another_process_of_the_pod_keeps_it(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        capturer.start(target)
        with process_of(pod) as second:
            pod.process.kill()
            pod.receive(10)
            (status,) = capturer.report(flush=True)
            assert (status.state, packets(capturer)) == (State.CAPTURING, 10)
            with process_of(pod):
                second()
                pod.receive(10)
                (status,) = capturer.report(flush=True)
                assert (status.state, packets(capturer)) == (State.CAPTURING, 20)
        assert capturer.next_state(State.FAILED).reason == "PodGone"


@contextlib.contextmanager
def process_of(pod: Pod) -> Iterator[Callable[[], None]]:
    """Another process in the pod; gives what ends it."""

    process = subprocess.Popen(["ip", "netns", "exec", pod.namespace, "sleep", "infinity"])
    inside = os.stat(f"/run/netns/{pod.namespace}").st_ino
    eventually(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino == inside)
    (pod.cgroup / "cgroup.procs").write_text(str(process.pid))

    def end() -> None:
        process.kill()
        process.wait()

    try:
        yield end
    finally:
        end()


def packets(capturer: Capturer) -> int:
    (status,) = capturer.report()
    return sum(interface.packets for interface in status.interfaces)


class TestEnd:
    def test_it_moves_without_a_restart(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        started = capturer.start(target).started
        pod.receive(10)
        for until in (time.time() + 3600, None, time.time() + 7200):
            status = capturer.start(replace(target, until=until))
            assert (status.started, status.state, status.target.until) == (started, State.CAPTURING, until)
        pod.receive(10)
        capturer.start(replace(target, until=time.time() - 1))
        status = capturer.next_state(State.STOPPED)
        assert status.started == started
        assert packets(capturer) == 20
        assert len(capturer.files(target)) == 1

    def test_anything_else_that_differs_is_refused(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target()
        capturer.start(target)
        with pytest.raises(AssertionError, match="stop it first"):
            capturer.start(replace(target, until=time.time() + 3600, max_files=3))
        (status,) = capturer.report()
        assert status.target == target

    @pytest.mark.parametrize(
        ("ends", "waiting", "seconds"),
        [
            ([], False, None),
            ([], True, 1.0),
            ([1000.25], False, 0.25),
            ([1005.0, 1000.5], True, 0.5),
            ([1e9], False, 1.0),
            ([999.0], False, 0.0),
        ],
    )
    def test_the_worker_waits_for_the_next_end_but_never_long(
        self, ends: list[float], waiting: bool, seconds: float | None
    ) -> None:
        assert longest_wait(ends, now=1000.0, waiting=waiting) == seconds

    def test_a_clock_that_is_set_meanwhile_counts(self, pod: Pod, tmp_path: Path) -> None:
        now = 1000.0
        path = tmp_path / "socket"
        captures = open_captures(tmp_path)
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as agent:
            listener.bind(str(path))
            listener.listen()
            worker = Worker(
                listener, captures=captures, host_namespace=HOST, allowed_uids=frozenset({0}), clock=lambda: now
            )
            worker.open()
            agent.connect(str(path))
            target = pod.target(until=5000.0)
            agent.sendall(encode(Start(request=1, target=target)))

            def becomes(state: State) -> bool:
                worker.turn()
                return worker.states == {target.id: state}

            eventually(lambda: becomes(State.CAPTURING))
            worker.turn()
            assert worker.states == {target.id: State.CAPTURING}
            now = 5000.0
            eventually(lambda: becomes(State.STOPPED))
            worker.close()
        os.close(captures)

    def test_the_worker_has_nothing_to_do_until_a_target_that_stops_has_ended(self, pod: Pod, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        captures = open_captures(tmp_path)
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as agent:
            listener.bind(str(path))
            listener.listen()
            worker = Worker(listener, captures=captures, host_namespace=HOST, allowed_uids=frozenset({0}))
            worker.open()
            agent.connect(str(path))
            target = pod.target(until=time.time() + 1)
            agent.sendall(encode(Start(request=1, target=target)))
            turns = 0
            while worker.states.get(target.id) is not State.STOPPED:
                worker.turn()
                turns += 1
                assert turns < 100, "it spins"
            worker.close()
        os.close(captures)
