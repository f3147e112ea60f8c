"""Which pod a process belongs to, and which network namespace may be captured for it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.capturer import netns
from agent.capturer.rtnetlink import local_addresses
from tests.agent.world import HOST, Pod

A = "0f4b1a5e-8d0c-4f5a-9a53-1d2d7a3c9b11"
B = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
A_SYSTEMD, B_SYSTEMD = A.replace("-", "_"), B.replace("-", "_")
STATIC = "d41d8cd98f00b204e9800998ecf8427e"


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        # cgroupfs
        (f"/kubepods/pod{A}/c1", A),
        (f"/kubepods/burstable/pod{A}/c1", A),
        (f"/kubepods/besteffort/pod{A}", A),
        (f"/cluster/node-1/kubepods/burstable/pod{A}/c1", A),
        (f"/kubepods/burstable/pod{STATIC}/c1", STATIC),
        # systemd
        (f"/kubepods.slice/kubepods-pod{A_SYSTEMD}.slice/cri-containerd-c1.scope", A),
        (f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{A_SYSTEMD}.slice/crio-c1.scope", A),
        (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{A_SYSTEMD}.slice", A),
        (f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable-pod{A_SYSTEMD}.slice/c.scope", A),
        # seen from the private cgroup namespace of a container in another pod
        (f"/../../pod{A}/c1", A),
        (f"/../../../burstable/pod{A}/c1", A),
        (f"/../../../../kubepods/burstable/pod{A}/c1", A),
        (f"/../../kubepods-burstable-pod{A_SYSTEMD}.slice/cri-containerd-c1.scope", A),
        # a container may make cgroups below its own and call them as it likes: the outermost pod counts
        (f"/kubepods/burstable/pod{A}/c1/pod{B}/c1", A),
        (f"/kubepods/burstable/pod{A}/c1/kubepods/burstable/pod{B}/c1", A),
        (f"/kubepods/burstable/pod{A}/c1/kubepods-burstable-pod{B_SYSTEMD}.slice", A),
        (f"/../../pod{A}/c1/pod{B}", A),
        # in no pod
        ("/", None),
        ("/..", None),
        ("/system.slice/containerd.service", None),
        (f"/pod{A}/c1", None),
        (f"/user.slice/user-1000.slice/pod{A}", None),
        (f"/docker/pod{A}/kubepods/pod{B}", None),
        (f"/../../other/pod{A}/c1", None),
        (f"/kubepods/xpod{A}/c1", None),
        (f"/kubepods/pod{A}x/c1", None),
        (f"/kubepods/pod{A.replace('-', '_', 1)}/c1", None),
        (f"/kubepods.slice/kubepods-burstable-pod{A_SYSTEMD}.scope", None),
    ],
)
def test_the_outermost_pod_below_kubepods_counts(path: str, uid: str | None) -> None:
    assert netns.pod_uid(f"0::{path}\n") == uid


def test_cgroup_v1_hierarchies_that_name_no_pod_do_not_matter() -> None:
    text = (
        f"12:pids:/kubepods/burstable/pod{A}/c1\n11:cpu,cpuacct:/kubepods/burstable/pod{A}/c1\n1:name=systemd:/\n0::/\n"
    )
    assert netns.pod_uid(text) == A


def test_hierarchies_that_name_different_pods_name_none() -> None:
    assert netns.pod_uid(f"12:pids:/kubepods/pod{A}/c1\n11:cpu:/kubepods/pod{B}/c1\n") is None


def test_a_path_may_hold_colons() -> None:
    assert netns.pod_uid(f"0::/kubepods/pod{A}/cri:containerd:c1\n") == A


def test_the_namespace_of_a_pod_is_found_by_uid_and_address(pod: Pod) -> None:
    with netns.open_pod(pod.uid, [ip_address(pod.address)], host=HOST, table=netns.ProcessTable()) as namespace:
        assert ip_address(pod.address) in namespace.run(local_addresses)


def test_entering_a_namespace_leaves_the_caller_where_it_is(pod: Pod) -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    inside = pod.in_pod(lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    assert inside == Path(f"/run/netns/{pod.namespace}").stat().st_ino
    assert os.stat("/proc/thread-self/ns/net").st_ino == before != inside


def test_an_exception_inside_a_namespace_reaches_the_caller(pod: Pod) -> None:
    with pytest.raises(ZeroDivisionError):
        pod.in_pod(lambda: 1 // 0)


def test_a_namespace_without_the_pods_address_is_refused(pod: Pod) -> None:
    with pytest.raises(netns.NamespaceError, match=r"holds its address 192\.0\.2\.1") as caught:
        netns.open_pod(pod.uid, [ip_address("192.0.2.1")], host=HOST, table=netns.ProcessTable())
    assert caught.value.reason == "AddressNotFound"


def test_a_pod_on_the_host_network_is_refused(pod: Pod) -> None:
    host = Path(f"/run/netns/{pod.namespace}")
    with pytest.raises(netns.NamespaceError, match="node's network") as caught:
        netns.open_pod(pod.uid, [ip_address(pod.address)], host=host, table=netns.ProcessTable())
    assert caught.value.reason == "HostNetwork"


def test_an_unknown_pod_is_refused() -> None:
    with pytest.raises(netns.NamespaceError, match="no process of the pod") as caught:
        netns.open_pod(B, [ip_address("10.0.0.1")], host=HOST, table=netns.ProcessTable())
    assert caught.value.reason == "NamespaceNotFound"


def test_many_that_look_at_the_same_time_share_a_scan(pod: Pod) -> None:
    table = netns.ProcessTable()
    begin = threading.Barrier(50)

    def look() -> None:
        begin.wait()
        with netns.open_pod(pod.uid, [ip_address(pod.address)], host=HOST, table=table):
            pass

    with ThreadPoolExecutor(50) as threads:
        for outcome in [threads.submit(look) for _ in range(50)]:
            outcome.result()
    assert 1 <= table.scans < 25


def test_a_look_that_begins_later_sees_what_began_meanwhile(pod: Pod) -> None:
    table = netns.ProcessTable()
    with pytest.raises(netns.NamespaceError):
        netns.open_pod(B, [ip_address(pod.address)], host=HOST, table=table)
    pod.become(B)
    with netns.open_pod(B, [ip_address(pod.address)], host=HOST, table=table):
        pass
    assert table.scans == 2


def test_a_process_that_took_the_number_of_another_is_not_taken_for_it(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns, "_scan", lambda: {B: [pod.process.pid, 2**22 - 1]})  # what was read before it changed
    with pytest.raises(netns.NamespaceError, match="no process of the pod"):
        netns.open_pod(B, [ip_address(pod.address)], host=HOST, table=netns.ProcessTable())
