"""Who may list and download files: RBAC, as users have it."""

import base64
import json
import ssl
from collections.abc import Iterator
from http.client import HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hack.clusters.cluster import Cluster
from hack.clusters.kubectl import Kubectl
from tests.e2e.captures import Capture, capturing, refused

HTTP = [{"protocol": "TCP", "ports": [80]}]


@pytest.fixture(scope="module")
def nginx_pcap(kubectl: Kubectl, examples: Path) -> Iterator[Capture]:
    with capturing(kubectl, "nginx-pcap", "dev", selector='app == "nginx"', filters=HTTP) as capture:
        capture.wait_for_pods(2)
        yield capture


@pytest.fixture(scope="module")
def catalogue(kubectl: Kubectl) -> Iterator[Capture]:
    """A capture in another namespace."""
    with capturing(kubectl, "catalogue", "hipstershop", selector='app == "productcatalogservice"') as capture:
        capture.wait_for_pods(1)
        yield capture


@pytest.fixture(scope="module")
def other(kubectl: Kubectl) -> Iterator[Capture]:
    """Another capture in the same namespace."""
    with capturing(kubectl, "other", "dev", selector='app == "nginx"') as capture:
        capture.wait_for_pods(2)
        yield capture


@pytest.mark.parametrize("user", ["operator", "files-reader", "nginx-reader"])
def test_who_may_get_files_lists_and_downloads_them(kubectl: Kubectl, nginx_pcap: Capture, user: str) -> None:
    listed = json.loads(kubectl.bytes("get", "--raw", nginx_pcap.path, user=user))
    assert len(listed["items"]) == 2
    for file in listed["items"]:
        assert len(kubectl.bytes("get", "--raw", file["url"], user=user)) >= file["size"]


def test_a_viewer_gets_neither_captures_nor_files(kubectl: Kubectl, nginx_pcap: Capture) -> None:
    assert "(Forbidden)" in refused(kubectl, "get", "packetcaptures", "--namespace=dev", user="viewer")
    for path in (nginx_pcap.path, nginx_pcap.files()[0]["url"]):
        said = refused(kubectl, "get", "--raw", path, user="viewer")
        assert "(Forbidden)" in said
        assert 'cannot get resource "packetcaptures/files" in API group "subresources.kubepcap.io"' in said
    assert kubectl("get", "pods", "--namespace=dev", user="viewer").returncode == 0


@pytest.mark.parametrize("user", ["operator", "files-reader", "nginx-reader", "viewer"])
def test_a_binding_in_one_namespace_gives_nothing_in_another(kubectl: Kubectl, catalogue: Capture, user: str) -> None:
    for path in (catalogue.path, catalogue.files()[0]["url"]):
        assert "(Forbidden)" in refused(kubectl, "get", "--raw", path, user=user)
    assert "(Forbidden)" in refused(kubectl, "get", "packetcaptures", "--namespace=hipstershop", user=user)


def test_resource_names_restrict_to_one_capture(kubectl: Kubectl, nginx_pcap: Capture, other: Capture) -> None:
    assert json.loads(kubectl.bytes("get", "--raw", nginx_pcap.path, user="nginx-reader"))["items"]
    for path in (other.path, other.files()[0]["url"]):
        assert "(Forbidden)" in refused(kubectl, "get", "--raw", path, user="nginx-reader")


def test_a_path_that_climbs_does_not_move_the_permission(
    cluster: Cluster, nginx_pcap: Capture, other: Capture, tmp_path: Path
) -> None:
    """kube-apiserver authorizes the first name that it reads, and passes the dots on."""
    climbing = other.path.replace("/other/", "/nginx-pcap/files/../../other/")
    for path, code, reason in (
        (nginx_pcap.path, 200, None),
        (other.path, 403, "Forbidden"),
        (climbing, 400, "BadRequest"),
        (climbing.replace("..", "%2e%2e"), 400, "BadRequest"),
    ):
        answer = ask(cluster, path, user="nginx-reader", directory=tmp_path)
        assert (answer.status, json.loads(answer.read()).get("reason")) == (code, reason)


def ask(cluster: Cluster, path: str, *, user: str, directory: Path) -> HTTPResponse:
    """GET with the path as it is, which kubectl and most HTTP clients would collapse."""
    config = json.loads(cluster.kubeconfig.read_text())
    credentials = config["users"][0]["user"]
    authority = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"])
    pem = directory / "admin.pem"
    pem.write_bytes(b"".join(base64.b64decode(credentials[f"client-{part}-data"]) for part in ("certificate", "key")))
    context = ssl.create_default_context(cadata=authority.decode())
    context.load_cert_chain(pem)
    server = urlsplit(cluster.api_url)
    connection = HTTPSConnection(str(server.hostname), server.port, context=context, timeout=30)
    connection.request("GET", path, headers={"Impersonate-User": user, "Connection": "close"})
    return connection.getresponse()


def test_a_files_reader_starts_no_capture(kubectl: Kubectl, examples: Path) -> None:
    manifest = str(examples / "nginx-pcap.yaml")
    assert "(Forbidden)" in refused(kubectl, "create", f"--filename={manifest}", user="files-reader")


@pytest.mark.parametrize(
    ("user", "namespace", "answer"),
    [("files-reader", "dev", "yes"), ("files-reader", "hipstershop", "no"), ("viewer", "dev", "no")],
)
def test_can_i_answers_truly(kubectl: Kubectl, examples: Path, user: str, namespace: str, answer: str) -> None:
    said = kubectl(
        "auth",
        "can-i",
        "get",
        "packetcaptures.subresources.kubepcap.io",
        "--subresource=files",
        f"--namespace={namespace}",
        user=user,
        check=False,
    )
    assert said.stdout.strip() == answer


def test_the_short_names_mean_the_captures(kubectl: Kubectl, nginx_pcap: Capture) -> None:
    for name in ("pcap", "pcaps", "packetcapture", "packetcaptures"):
        assert "nginx-pcap" in kubectl("get", name, "--namespace=dev").stdout


def test_what_does_not_exist_is_said(kubectl: Kubectl, nginx_pcap: Capture) -> None:
    missing = nginx_pcap.path.replace("nginx-pcap", "no-such-capture")
    assert 'packetcaptures.kubepcap.io "no-such-capture" not found' in refused(kubectl, "get", "--raw", missing)
    file = nginx_pcap.files()[0]
    elsewhere = next(node for node in ("node-a", "node-b") if node != file["node"])
    assert "(NotFound)" in refused(kubectl, "get", "--raw", f"{nginx_pcap.path}/{elsewhere}/{file['name']}")
    assert "(NotFound)" in refused(kubectl, "get", "--raw", f"{nginx_pcap.path}/no-such-node/{file['name']}")
    assert "(BadRequest)" in refused(kubectl, "get", "--raw", f"{nginx_pcap.path}/{file['node']}/passwd")
