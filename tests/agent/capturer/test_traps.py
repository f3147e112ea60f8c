"""The traps of libpcap, the kernel and the C library that this capturer was built around, one test each.

Traps 5 (filters and stripped VLAN tags) and 9 (super-packets) are in test_read_back.py, 7 (pinned namespaces) also in
test_target.py, 10 (slow closes) in test_worker.py: each under its number.
"""

import itertools
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from agent.capturer import libpcap
from agent.capturer.dump import Buffer, Dump
from agent.capturer.libpcap import FilterError, Handle
from agent.capturer.protocol import State
from tests.agent.world import HEADERS, PORT, Capturer, Pod, eventually, in_namespace, run


def packets_in(path: Path) -> int:
    done = subprocess.run(["tcpdump", "--count", "-r", str(path)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0])


def opened(pod: Pod, expression: str) -> Handle:
    def open_() -> Handle:
        handle = Handle("eth0", snap_length=2048, ring_bytes=4 << 20, timeout_milliseconds=50)
        handle.set_filter(expression)
        handle.open_gate()
        return handle

    return in_namespace(pod.namespace, open_)


def test_trap_1_a_dispatch_never_goes_past_the_limit_of_a_file(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(max_file_bytes=200_000, max_files=1000)
    capturer.start(target)
    worker = capturer.worker_pid()
    os.kill(worker, signal.SIGSTOP)  # a whole ring waits for the first dispatch
    pod.receive(2000, size=1000)
    os.kill(worker, signal.SIGCONT)
    status = capturer.stop(target)
    files = capturer.files(target)
    assert len(files) > 10
    assert max(file.stat().st_size for file in files) <= 200_000
    assert sum(packets_in(file) for file in files) == 2000 == status.interfaces[0].packets


def test_trap_2_a_stop_writes_what_the_kernel_has_not_handed_over_yet(pod: Pod, capturer: Capturer) -> None:
    for _ in range(5):
        target = pod.target()
        capturer.start(target)
        pod.receive(676)
        (interface,) = capturer.stop(target).interfaces
        assert (interface.packets, interface.dropped) == (676, 0)
        assert packets_in(capturer.files(target)[0]) == 676


@pytest.mark.parametrize("word", ["inbound", "outbound"])
def test_trap_3_words_of_direction_are_refused(pod: Pod, capturer: Capturer, word: str) -> None:
    status = capturer.start(pod.target(filter=f"udp and {word}"))
    assert (status.state, status.reason) == (State.FAILED, "FilterInvalid")
    assert word in status.message


def test_nothing_comes_in_before_the_gate_is_open(pod: Pod) -> None:
    """Else nobody could tell how many of the packets that the kernel counted passed the filter."""

    def open_while_packets_come() -> Handle:
        handle = Handle("eth0", snap_length=2048, ring_bytes=4 << 20, timeout_milliseconds=50)
        pod.receive(100)
        handle.set_filter("udp")
        pod.receive(100)
        return handle

    handle = in_namespace(pod.namespace, open_while_packets_come)
    assert handle.statistics() == (0, 0)
    handle.open_gate()
    pod.receive(100)
    assert handle.statistics() == (100, 0)
    handle.close_gate()
    pod.receive(100)
    assert handle.statistics() == (100, 0)
    handle.close()


def test_trap_4_the_buffer_is_as_large_as_asked_for(pod: Pod, tmp_path: Path) -> None:
    handle = opened(pod, "udp")
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    dump = Dump(handle, descriptor, Buffer(256 << 10), limit=1 << 30)
    pod.receive(1000, size=1000)
    written = 0

    def dispatched() -> bool:
        nonlocal written
        written += handle.dispatch(4096, dump.pointer)
        return written == 1000

    eventually(dispatched)
    assert path.stat().st_size == (dump.tell() >> 18) << 18, "whole buffers, nothing else"
    dump.flush()
    assert path.stat().st_size == dump.tell()
    dump.close()
    handle.close()


def test_trap_6_a_disk_that_is_full_is_noticed(pod: Pod, tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=1m", "kpc-test", str(tmp_path))
    capturer = Capturer(tmp_path)
    try:
        target = pod.target()
        capturer.start(target)
        os.kill(capturer.worker_pid(), signal.SIGSTOP)  # so that all of it has come when the disk fills
        pod.receive(3000, size=1000)
        os.kill(capturer.worker_pid(), signal.SIGCONT)
        status = capturer.next_state(State.FAILED)
        assert status.reason == "WriteFailed"
        assert "No space left on device" in status.message
        ((interface,),) = (status.interfaces for status in capturer.report())
        (file,) = capturer.files(target)
        assert file.stat().st_size == interface.files[0].size
        assert packets_in(file) == interface.packets == interface.files[0].packets
        assert interface.packets + interface.dropped == 3000
        assert interface.files[0].dropped == interface.dropped
    finally:
        capturer.close()
        run("umount", str(tmp_path))


def test_trap_7_a_stopped_capture_does_not_pin_the_pods_namespace(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    capturer.stop(target)
    namespace = Path(f"/run/netns/{pod.namespace}").stat().st_ino
    worker = Path(f"/proc/{capturer.worker_pid()}/task")
    eventually(lambda: len(list(worker.iterdir())) == 1)
    assert worker.parent.joinpath("ns/net").stat().st_ino != namespace
    open_files = [os.readlink(entry) for entry in worker.parent.joinpath("fd").iterdir()]
    assert not [name for name in open_files if "pcap" in name or name.startswith("net:") or "pidfd" in name]
    assert not [name for name in open_files if "socket" in name][4:]  # the listener, this connection, the wake-up pair


def test_trap_7_an_interface_that_goes_ends_the_capture_and_keeps_its_packets(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    pod.receive(100)
    run("ip", "-n", pod.peer, "link", "del", "peer0")
    status = capturer.next_state(State.FAILED)
    assert status.reason == "InterfaceFailed"
    assert "eth0" in status.message
    ((interface,),) = (status.interfaces for status in capturer.report())
    assert (interface.packets, interface.dropped) == (100, 0)
    assert packets_in(capturer.files(target)[0]) == 100


def test_trap_8_packets_reach_the_disk_without_being_asked_for(pod: Pod, capturer: Capturer) -> None:
    target = pod.target()
    capturer.start(target)
    (file,) = capturer.files(target)
    pod.receive(1)
    eventually(lambda: file.stat().st_size > 24)
    pod.receive(1)
    eventually(lambda: packets_in(file) == 2)
    os.kill(capturer.worker_pid(), signal.SIGKILL)
    capturer.read_to_end()
    capturer.connect()
    assert packets_in(file) == 2


def test_trap_8_a_file_is_turned_over_by_age_without_further_traffic(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(max_file_age_seconds=1, max_files=10)
    capturer.start(target)
    pod.receive(5)
    eventually(lambda: len(capturer.files(target)) == 2)
    capturer.stop(target)
    first, second = capturer.files(target)
    assert (packets_in(first), packets_in(second)) == (5, 0)


def test_what_is_lost_as_an_interface_goes_is_counted(pod: Pod, capturer: Capturer) -> None:
    target = pod.target(ring_bytes=1 << 19)
    capturer.start(target)
    os.kill(capturer.worker_pid(), signal.SIGSTOP)  # nobody empties the ring
    pod.receive(5000, size=1000)
    run("ip", "-n", pod.peer, "link", "del", "peer0")
    os.kill(capturer.worker_pid(), signal.SIGCONT)
    capturer.next_state(State.FAILED)
    ((interface,),) = (status.interfaces for status in capturer.report())
    assert interface.dropped > 0
    assert interface.packets + interface.dropped == 5000
    assert packets_in(capturer.files(target)[0]) == interface.packets


def test_from_the_first_packet_of_a_capture_to_its_last_none_is_missing(pod: Pod, capturer: Capturer) -> None:
    stop = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
            for number in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                channel.sendto(number.to_bytes(8, "big"), (pod.address, PORT))

    flooding = threading.Thread(target=pod.in_peer, args=(flood,))
    flooding.start()
    try:
        for _ in range(10):
            target = pod.target()
            capturer.start(target)
            eventually(lambda: capturer.report(flush=True)[0].interfaces[0].packets)
            (interface,) = capturer.stop(target).interfaces
            (file,) = capturer.files(target)
            with RawPcapReader(str(file)) as reader:
                numbers = [int.from_bytes(packet[HEADERS : HEADERS + 8], "big") for packet, _ in reader]
            assert (len(numbers), interface.dropped) == (interface.packets, 0)
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    finally:
        stop.set()
        flooding.join()


def test_a_filter_that_the_kernel_does_not_take_is_refused(pod: Pod) -> None:
    """libpcap would filter by itself, and all that does not match would count as dropped."""
    with pytest.raises(FilterError, match="the kernel does not take a filter of"):
        opened(pod, " + ".join(f"ip[{offset}]" for offset in range(1400)) + " = 5")


def test_a_filter_is_compiled_once_for_all_that_use_it(pod: Pod) -> None:
    expression = f"udp port {PORT} and not host 10.201.7.7"
    before = libpcap.programs.compilations
    handles: list[Handle] = []
    threads = [threading.Thread(target=lambda: handles.append(opened(pod, expression))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(handles), libpcap.programs.compilations) == (4, before + 1)
    pod.receive(10)
    pod.receive(10, port=PORT + 1)
    assert [handle.statistics() for handle in handles] == [(10, 0)] * 4
    for handle in handles:
        handle.close()


def test_a_filter_that_does_not_compile_is_told_each_time(pod: Pod) -> None:
    for _ in range(2):
        with pytest.raises(FilterError, match="syntax error"):
            opened(pod, "udp port")
