"""The main path: a capture is applied, traffic flows, its files are downloaded through kube-apiserver."""

import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.utils import rdpcap

from hack.clusters.cluster import Cluster
from hack.clusters.keeper import entering
from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import Capture, Tcpdump, capturing, packets, pods, refused, until

HTTP = [{"protocol": "TCP", "ports": [80]}]
NGINX = 'app == "nginx"'


@pytest.fixture
def nginx_pcap(kubectl: Kubectl, examples: Path) -> Iterator[Capture]:
    """The workshop's capture, running on both pods."""
    kubectl("apply", f"--filename={examples / 'nginx-pcap.yaml'}")
    capture = Capture(kubectl, "dev", "nginx-pcap")
    capture.wait_for_pods(2)
    yield capture
    capture.delete()


def curl(kubectl: Kubectl, url: str, *, client: str = "netshoot", times: int = 1) -> None:
    loop = f"for i in $(seq {times}); do curl -sS -o /dev/null -m 5 {url}; done"
    kubectl("exec", "--namespace=dev", client, "--", "sh", "-c", loop)


def test_files_hold_exactly_the_packets_that_tcpdump_sees_in_the_pod(
    kubectl: Kubectl, nginx_pcap: Capture, tmp_path: Path
) -> None:
    nginx = pods(kubectl, "dev", "app=nginx")
    addresses = {name: pod["status"]["podIP"] for name, pod in nginx.items()}
    assert {pod["spec"]["nodeName"] for pod in nginx.values()} == {"node-a", "node-b"}
    first, second = nginx
    with (
        Tcpdump(kubectl, first, "dev", "tcp port 80") as tcpdump_first,
        Tcpdump(kubectl, second, "dev", "tcp port 80") as tcpdump_second,
    ):
        for number, address in enumerate(addresses.values()):
            curl(kubectl, f"http://{address}/", times=10 + number)
            curl(kubectl, f"http://{address}/", client="centos", times=3)
            # Other traffic of the same pods: another port, another protocol, and as clients of each other.
            kubectl("exec", "--namespace=dev", "netshoot", "--", "nc", "-z", "-w1", address, "81", check=False)
            kubectl("exec", "--namespace=dev", "netshoot", "--", "ping", "-c2", address)
        curl(kubectl, f"http://{addresses[second]}/", client=first, times=2)
        files = {file["pod"]: file for file in nginx_pcap.files()}
        expected = {first: tcpdump_first.stop(), second: tcpdump_second.stop()}

    assert {file["node"] for file in files.values()} == {"node-a", "node-b"}
    assert set(files) == set(nginx), "files of other pods"
    for pod, file in files.items():
        pcap = nginx_pcap.download(file)
        assert len(pcap) == file["size"]
        assert by_sender(packets(pcap)) == by_sender(packets(expected[pod]))
        assert file["packets"] == len(packets(pcap)) > 50
        assert file["dropped"] == 0
        for data in packets(pcap):
            packet = Ether(data)
            assert addresses[pod] in (packet[IP].src, packet[IP].dst)
            assert 80 in (packet[TCP].sport, packet[TCP].dport)


def by_sender(packets: list[bytes]) -> dict[bytes, list[bytes]]:
    """In order for each Ethernet source: what comes and what goes at once passes two sockets in either order."""
    sent: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for packet in packets:
        sent[packet[6:12]].append(packet)
    return sent


def test_files_are_read_by_the_tools_people_use(kubectl: Kubectl, nginx_pcap: Capture, tmp_path: Path) -> None:
    curl(kubectl, "http://nginx-svc/", times=20)
    files = [file for file in nginx_pcap.files() if file["packets"]]
    assert files
    for file in files:
        saved = tmp_path / file["name"]
        saved.write_bytes(nginx_pcap.download(file))
        read = subprocess.run(["tcpdump", "-nAr", saved], capture_output=True, text=True, check=True)
        assert "GET / HTTP/1.1" in read.stdout
        assert len(rdpcap(str(saved))) == file["packets"]
        about = subprocess.run(["capinfos", "-Mc", saved], capture_output=True, text=True, check=True)
        assert about.stdout.split()[-1] == str(file["packets"])
        times = subprocess.run(["tcpdump", "-nttr", saved], capture_output=True, text=True, check=True).stdout
        assert times.startswith(_epoch(file["firstPacketTime"]))
        assert times.splitlines()[-1].startswith(_epoch(file["lastPacketTime"]))


def test_a_file_is_downloaded_in_pieces(kubectl: Kubectl, nginx_pcap: Capture) -> None:
    curl(kubectl, "http://nginx-svc/", times=20)
    file = max(nginx_pcap.files(), key=lambda file: int(file["size"]))
    whole = nginx_pcap.download(file)
    third = len(whole) // 3
    pieces = [
        kubectl.bytes("get", "--raw", f"{file['url']}&offset={offset}&limit={limit}")
        for offset, limit in ((0, third), (third, third), (2 * third, len(whole)))
    ]
    assert b"".join(pieces)[: len(whole)] == whole


def test_a_stopped_capture_keeps_its_files_and_gives_their_hash(
    kubectl: Kubectl, nginx_pcap: Capture, tmp_path: Path
) -> None:
    curl(kubectl, "http://nginx-svc/", times=5)
    kubectl("patch", "pcap", "nginx-pcap", "--namespace=dev", "--type=merge", '--patch={"spec":{"suspend":true}}')
    until("finished files", lambda: all(file.get("sha256") for file in nginx_pcap.files()))
    files = nginx_pcap.files()
    assert len(files) == 2
    for file in files:
        saved = tmp_path / file["name"]
        saved.write_bytes(nginx_pcap.download(file))
        hashed = subprocess.run(["sha256sum", saved], capture_output=True, text=True, check=True)
        assert hashed.stdout.split()[0] == file["sha256"]
    before = {file["name"]: file["size"] for file in files}
    curl(kubectl, "http://nginx-svc/", times=5)
    assert {file["name"]: file["size"] for file in nginx_pcap.files()} == before


def test_a_pod_that_comes_later_is_captured_and_one_that_is_relabelled_is_let_go(
    kubectl: Kubectl, nginx_pcap: Capture
) -> None:
    overrides = (
        '{"spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "late", "command": '
        '["nginx", "-g", "daemon off;"], "image": "kubepcap.invalid/tools:dev", "readinessProbe": '
        '{"periodSeconds": 1, "exec": {"command": ["test", "-s", "/run/nginx.pid"]}}}]}}'
    )
    image = "--image=kubepcap.invalid/tools:dev"
    kubectl("run", "late", "--namespace=dev", "--labels=app=nginx", image, f"--overrides={overrides}")
    try:
        kubectl("wait", "--namespace=dev", "--for=condition=Ready", "pod/late", "--timeout=60s")
        address = kubectl.json("get", "pod", "late", "--namespace=dev")["status"]["podIP"]
        curl(kubectl, f"http://{address}/", times=5)
        (file,) = until("a file of the late pod", lambda: nginx_pcap.files_of("late"))
        openings = [packet for packet in map(Ether, packets(nginx_pcap.download(file))) if packet[TCP].flags == "S"]
        assert len(openings) == 5, "all connections since it was ready are there, from their first packet"

        kubectl("label", "pod", "late", "--namespace=dev", "app=gone", "--overwrite")
        (finished,) = until(
            "the late pod to be let go",
            lambda: [file for file in nginx_pcap.files_of("late") if file["state"] == "Finished"],
        )
        curl(kubectl, f"http://{address}/", times=5)
        (after,) = nginx_pcap.files_of("late")
        assert after["size"] == finished["size"]
        assert packets(nginx_pcap.download(after)) == packets(nginx_pcap.download(finished))
    finally:
        kubectl("delete", "pod", "late", "--namespace=dev", "--now")


def test_a_pod_or_namespace_that_opts_out_is_not_captured(kubectl: Kubectl) -> None:
    name = next(iter(pods(kubectl, "hipstershop", "app=productcatalogservice")))
    with capturing(kubectl, "catalogue", "hipstershop", selector='app == "productcatalogservice"') as capture:
        capture.wait_for_phase("Capturing")
        kubectl("label", "pod", name, "--namespace=hipstershop", "kubepcap.io/capture=deny")
        try:
            capture.wait_for_pods(0)
            status = until("the reason", lambda: s if "OptedOut" in str(s := capture.status()) else None)
            assert "kubepcap.io/capture=deny" in str(status)
        finally:
            kubectl("label", "pod", name, "--namespace=hipstershop", "kubepcap.io/capture-")
        capture.wait_for_pods(1)


def test_start_and_end_are_kept(kubectl: Kubectl, cluster: Cluster) -> None:
    start, end = (
        subprocess.run(["date", "-u", "-d", when, "+%Y-%m-%dT%H:%M:%SZ"], capture_output=True, text=True, check=True)
        for when in ("now + 4 seconds", "now + 9 seconds")
    )
    times = {"startTime": start.stdout.strip(), "endTime": end.stdout.strip()}
    # The shop's front end asks the catalogue once a second, before, between and after.
    with capturing(kubectl, "timed", "hipstershop", selector='app == "productcatalogservice"', **times) as capture:
        capture.wait_for_phase("Scheduled")
        capture.wait_for_phase("Capturing", "WaitingForTraffic")
        capture.wait_for_phase("Finished")
        (file,) = until("the finished file", lambda: [file for file in capture.files() if file["state"] == "Finished"])
        assert file["packets"] > 0
        assert times["startTime"].removesuffix("Z") <= file["firstPacketTime"] < file["lastPacketTime"]
        assert file["lastPacketTime"] <= times["endTime"].removesuffix("Z")


def test_a_capture_that_sees_nothing_says_why(kubectl: Kubectl) -> None:
    with capturing(kubectl, "nobody", "dev", selector='app == "nobody"') as capture:
        capture.wait_for_phase("WaitingForTraffic")
        assert "no" in capture.condition("Capturing")["message"].lower()
        assert "match" in capture.condition("Capturing")["message"]
        assert capture.files() == []


def test_files_go_with_their_capture(kubectl: Kubectl, cluster: Cluster) -> None:
    with capturing(kubectl, "brief", "dev", selector=NGINX, filters=HTTP) as capture:
        capture.wait_for_pods(2)
        curl(kubectl, "http://nginx-svc/", times=5)
        uid = capture.get()["metadata"]["uid"]
        url = capture.files()[0]["url"]
        assert _directory(cluster, uid) == {"node-a": True, "node-b": True}
    until("the files to go", lambda: not any(_directory(cluster, uid).values()))
    assert "not found" in refused(kubectl, "get", "--raw", url)
    # Another capture of the same name has nothing to do with the old one's files.
    with capturing(kubectl, "brief", "dev", selector=NGINX, filters=HTTP) as again:
        again.wait_for_pods(2)
        assert "is another capture now" in refused(kubectl, "get", "--raw", url)


def _directory(cluster: Cluster, uid: str) -> dict[str, bool]:
    """Whether each node has a directory of the capture."""
    test = ["test", "-d", f"/var/lib/kubepcap/captures/{uid}"]
    return {
        node: subprocess.run([*entering(cluster, node), *test], check=False).returncode == 0 for node in cluster.nodes
    }


def _epoch(timestamp: str) -> str:
    """RFC 3339 with nanoseconds as tcpdump -tt prints it for a file of nanoseconds."""
    seconds, _, fraction = timestamp.removesuffix("Z").partition(".")
    date = ["date", "-u", "-d", f"{seconds}Z", "+%s"]
    whole = subprocess.run(date, capture_output=True, text=True, check=True).stdout.strip()
    return f"{whole}.{fraction[:6]}"
