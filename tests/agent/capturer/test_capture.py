"""A real capturer on real traffic: every packet counted, and read back from the files."""

import os
import resource
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from agent.capturer.capture import pause_for
from agent.capturer.libpcap import FILE_HEADER_BYTES
from agent.capturer.protocol import State
from tests.agent.world import HEADERS, PORT, Capturer, Pod, eventually, make_pod, send


def packets_in(path: Path) -> int:
    """Packets of the file as tcpdump counts them; it fails on a file cut off inside a record."""
    done = subprocess.run(["tcpdump", "--count", "-r", str(path)], check=True, capture_output=True, text=True)
    assert "truncated" not in done.stderr
    return int(done.stdout.split()[0])


def payloads_in(path: Path) -> list[int]:
    """The numbers that `send` gave to the datagrams."""
    with RawPcapReader(str(path)) as reader:
        return [int.from_bytes(packet[HEADERS : HEADERS + 8], "big") for packet, _ in reader]


def test_every_packet_is_in_the_file_and_counted(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    assert capturer.start(target).state is State.CAPTURING
    pod.receive(20_000)
    status = capturer.stop(target)
    (file,) = capturer.files(target)
    assert payloads_in(file) == list(range(20_000))
    (interface,) = status.interfaces
    (recorded,) = interface.files
    assert status.state is State.STOPPED
    assert (interface.interface, interface.packets, interface.dropped) == ("eth0", 20_000, 0)
    assert (recorded.name, recorded.size, recorded.packets) == (file.name, file.stat().st_size, 20_000)
    assert not recorded.open


def test_only_what_passes_the_filter_is_captured(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    pod.receive(50, port=PORT + 1)
    pod.receive(100)
    status = capturer.stop(target)
    (file,) = capturer.files(target)
    assert packets_in(file) == 100 == status.interfaces[0].packets


def test_packets_out_of_the_pod_are_captured_too(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    pod.in_pod(lambda: send("10.201.0.1", count=10))
    capturer.stop(target)
    (file,) = capturer.files(target)
    assert packets_in(file) == 10


def test_packets_lost_for_want_of_ring_are_counted_exactly(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(ring_bytes=1 << 19)
    capturer.start(target)
    worker = capturer.worker_pid()
    os.kill(worker, signal.SIGSTOP)  # nobody empties the ring
    pod.receive(20_000, size=1000)
    os.kill(worker, signal.SIGCONT)
    status = capturer.stop(target)
    (file,) = capturer.files(target)
    (interface,) = status.interfaces
    assert interface.dropped > 0
    assert interface.files[0].dropped == interface.dropped
    assert packets_in(file) == interface.packets == 20_000 - interface.dropped


def test_no_file_passes_its_size_and_none_is_lost_while_there_is_room(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(max_file_bytes=100_000, max_files=1000, ring_bytes=64 << 20)
    capturer.start(target)
    pod.receive(10_000, size=500)
    status = capturer.stop(target)
    files = capturer.files(target)
    assert len(files) > 40
    assert max(file.stat().st_size for file in files) <= 100_000
    assert min(file.stat().st_size for file in files[:-1]) > 100_000 - 2 * (2048 + 16)
    assert [number for file in files for number in payloads_in(file)] == list(range(10_000))
    assert sum(file.packets for file in status.interfaces[0].files) == 10_000


def test_rotation_keeps_the_newest_files(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(max_file_bytes=100_000, max_files=3, ring_bytes=64 << 20)
    capturer.start(target)
    pod.receive(10_000, size=500)
    status = capturer.stop(target)
    files = capturer.files(target)
    assert [file.name for file in files] == [file.name for file in status.interfaces[0].files]
    assert len(files) == 3
    kept = [number for file in files for number in payloads_in(file)]
    assert kept == list(range(kept[0], 10_000))


def test_starting_again_where_nothing_can_be_written_keeps_what_was_captured_before(
    pod: Pod, capturer: Capturer
) -> None:
    target = pod.target(max_files=1)
    capturer.start(target)
    pod.receive(10)
    capturer.stop(target)
    (kept,) = capturer.files(target)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file takes its header and not one packet.
    resource.prlimit(capturer.worker_pid(), resource.RLIMIT_FSIZE, (FILE_HEADER_BYTES, most))
    capturer.start(target)
    pod.receive(10)
    assert capturer.next_state(State.FAILED).reason == "WriteFailed"
    assert payloads_in(kept) == list(range(10))
    capturer.stop(target)


def test_starting_again_without_traffic_keeps_what_was_captured_before(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(max_files=2)
    capturer.start(target)
    pod.receive(10)
    capturer.stop(target)
    (kept,) = capturer.files(target)
    for _ in range(5):
        capturer.start(target)
        capturer.stop(target)
    assert kept in capturer.files(target)
    assert packets_in(kept) == 10
    assert len(capturer.files(target)) == 2, "empty files of before are removed"
    for _ in range(2):
        capturer.start(target)
        pod.receive(1)
        capturer.stop(target)
    assert kept not in capturer.files(target), "with traffic the oldest makes room"
    assert len(capturer.files(target)) == 2


def test_a_file_may_grow_older_than_poll_can_wait(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(max_file_age_seconds=30 * 86400)
    capturer.start(target)
    pod.receive(5)
    (status,) = capturer.report(flush=True)
    pod.receive(5)
    (status,) = capturer.report(flush=True)
    assert (status.state, status.interfaces[0].packets) == (State.CAPTURING, 10)


def test_a_capture_that_saw_nothing_is_a_valid_empty_file(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    (file,) = capturer.files(target)
    assert file.stat().st_size == 24
    assert packets_in(file) == 0


def test_a_flush_makes_all_packets_readable_up_to_the_size_told(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    for sent in range(300, 6300, 300):  # each time asked at once: also for the block that the kernel still fills
        pod.receive(300)
        (status,) = capturer.report(flush=True)
        assert status.interfaces[0].packets == sent
    (file,) = status.interfaces[0].files
    path = capturer.files(target)[0]
    assert file.open
    assert file.size <= path.stat().st_size
    copy = capturer.directory / "copy.pcap"
    copy.write_bytes(path.read_bytes()[: file.size])
    assert packets_in(copy) == file.packets == sent
    assert 24 <= file.last_batch_offset < file.size


def test_a_snap_length_cuts_packets_and_keeps_their_length(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(snap_length=60)
    capturer.start(target)
    pod.receive(1, size=1000)
    capturer.stop(target)
    with RawPcapReader(str(capturer.files(target)[0])) as reader:
        ((packet, metadata),) = reader
    assert (len(packet), metadata.wirelen) == (60, HEADERS + 1000)


def test_the_loopback_is_captured_on_request(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(interfaces=("lo",))
    capturer.start(target)
    pod.in_pod(lambda: send("127.0.0.1", count=7))
    (interface,) = capturer.stop(target).interfaces
    assert (interface.packets, interface.dropped) == (7, 0), "though each passes the loopback twice"
    (file,) = capturer.files(target)
    assert "_lo-" in file.name
    assert packets_in(file) == 7


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"pod_uid": str(uuid.uuid4())}, "NamespaceNotFound"),
        ({"pod_addresses": ("192.0.2.9",)}, "AddressNotFound"),
        ({"interfaces": ("eth7",)}, "InterfaceNotFound"),
        ({"filter": "no such thing"}, "FilterInvalid"),
    ],
)
def test_what_can_not_be_captured_says_why(
    pod: Pod, capturer: Capturer, settings: dict[str, object], reason: str
) -> None:
    target = pod.target(**settings)
    status = capturer.start(target)
    assert (status.state, status.reason) == (State.FAILED, reason)
    assert status.message
    assert capturer.stop(target).state is State.FAILED
    assert capturer.report() == ()


def test_starting_again_changes_nothing(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    pod.receive(10)
    assert capturer.start(target).state is State.CAPTURING
    pod.receive(10)
    assert capturer.stop(target).interfaces[0].packets == 20


def test_a_capture_ends_at_its_time_without_an_agent(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(until=time.time() + 1)
    capturer.start(target)
    assert capturer.next_state(State.STOPPED).target == target


def test_several_pods_are_captured_apart(capturer: Capturer) -> None:
    with make_pod() as first, make_pod(address="10.202.0.2", peer_address="10.202.0.1") as second:
        capture = str(uuid.uuid4())
        targets = [pod.target(capture_uid=capture) for pod in (first, second)]
        for target in targets:
            capturer.start(target)
        first.receive(30)
        second.receive(40)
        assert [capturer.stop(target).interfaces[0].packets for target in targets] == [30, 40]
        assert sorted(packets_in(file) for file in capturer.files(targets[0])) == [30, 40]


class TestWorkerDeath:
    def test_a_killed_worker_is_replaced_and_files_go_on(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(max_files=2)
        for round_ in range(3):
            assert capturer.start(target).state is State.CAPTURING
            pod.receive(10)
            eventually(lambda: capturer.report(flush=True)[0].interfaces[0].packets == 10)
            worker = capturer.worker_pid()
            os.kill(worker, signal.SIGKILL)
            capturer.read_to_end()
            capturer.connect()
            assert capturer.report() == ()
            assert [packets_in(file) for file in capturer.files(target)] == [10] * min(round_ + 1, 2)

    def test_termination_drains_and_closes_everything(self, pod: Pod, tmp_path: Path) -> None:
        capturer = Capturer(tmp_path)
        target = pod.target()
        capturer.start(target)
        pod.receive(500)
        capturer.close()
        assert packets_in(capturer.files(target)[0]) == 500


@pytest.mark.parametrize("direct", [False, True])
def test_three_capabilities_are_enough(pod: Pod, tmp_path: Path, direct: bool) -> None:
    rights = ("--bounding-set", "-all,+net_raw,+sys_admin,+sys_ptrace", "--regid", "65532", "--clear-groups")
    capturer = Capturer(tmp_path, prefix=("setpriv", *rights, "--no-new-privs"))
    target = pod.target(direct=direct)
    assert capturer.start(target).state is State.CAPTURING
    pod.receive(10)
    capturer.stop(target)
    (file,) = capturer.files(target)
    assert packets_in(file) == 10
    assert (file.stat().st_gid, file.stat().st_mode & 0o7777) == (65532, 0o660)
    assert (file.parent.stat().st_gid, file.parent.stat().st_mode & 0o7777) == (65532, 0o2770)
    capturer.close()


def test_a_foreign_user_may_not_connect(capturer: Capturer) -> None:
    script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.exit(len(s.recv(1)))"
    path = capturer.directory / "capturer.sock"
    path.chmod(0o666)
    for parent in (capturer.directory, *capturer.directory.parents[:2]):
        parent.chmod(0o755)
    done = subprocess.run(["python3", "-c", script, str(path)], check=False, user=65534, timeout=20)
    assert done.returncode == 0  # closed without a word


def test_a_link_in_the_place_of_a_directory_is_not_followed(pod: Pod, capturer: Capturer, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = pod.target()
    capturer.captures.joinpath(target.capture_uid).symlink_to(elsewhere)
    status = capturer.start(target)
    assert (status.state, status.reason) == (State.FAILED, "OpenFailed")
    assert list(elsewhere.iterdir()) == []


def test_the_node_itself_is_never_captured(pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.agent.world.HOST", Path(f"/run/netns/{pod.namespace}"))
    capturer = Capturer(tmp_path)
    status = capturer.start(pod.target())
    assert (status.state, status.reason) == (State.FAILED, "HostNetwork")
    capturer.close()


@pytest.mark.parametrize(
    ("size", "seconds", "ring", "rested"),
    [
        (0, 1.0, 4 << 20, 0.0),
        (100_000, 0.05, 4 << 20, 0.0),  # the kernel's timer handed it over: there is nothing to gain
        (1 << 18, 0.004, 4 << 20, 0.008),  # two blocks at a time instead of one
        (1 << 20, 0.001, 4 << 20, 0.0),  # the ring is full in 4 ms
        (1 << 18, 0.05, 4 << 20, 0.01),
        (1 << 20, 0.001, 64 << 20, 0.008),
    ],
)
def test_a_busy_capture_rests_until_an_eighth_of_its_ring_is_full(
    size: int, seconds: float, ring: int, rested: float
) -> None:
    assert pause_for(size, seconds, ring=ring) == rested
