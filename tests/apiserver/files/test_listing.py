import json

import pytest

from api.capturenode import CaptureNode
from api.files import CaptureReference
from apiserver.files.capture import file_url
from apiserver.files.listing import nodes_with, read_answer

UID = "11111111-2222-4333-8444-555555555555"
OTHER_UID = "00000000-0000-4000-8000-000000000000"
CAPTURE = CaptureReference(namespace="dev", name="web", uid=UID)
NAME = "web-1_eth0-20261201T100000.000000000Z-0a1b2c3d-0.pcap"


def file(name: str = NAME, **fields: object) -> dict[str, object]:
    return {
        "node": "n1",
        "pod": "web-1",
        "interface": "eth0",
        "name": name,
        "size": 24,
        "packets": 0,
        "dropped": 0,
        "state": "Writing",
    } | fields


def answer(*files: object) -> bytes:
    return json.dumps({"items": files}).encode()


def capture_node(name: str, *uids: str) -> CaptureNode:
    reports = [json.dumps({"namespace": "dev", "name": "web", "uid": uid, "state": "Capturing"}) for uid in uids]
    return CaptureNode.model_validate({"metadata": {"name": name}, "status": {"reports": reports}})


def test_only_nodes_that_name_the_captures_uid_are_asked() -> None:
    nodes = [capture_node("c", UID), capture_node("b", OTHER_UID), capture_node("a", OTHER_UID, UID), capture_node("d")]

    assert nodes_with(UID, nodes) == ["a", "c"]


def test_files_are_sorted_and_have_the_url_that_downloads_them() -> None:
    later = NAME.replace("-0.pcap", "-1.pcap")

    files = read_answer(answer(file(later), file()), node="n1", capture=CAPTURE)

    assert [one.name for one in files] == [NAME, later]
    assert files[0].url == (
        f"/apis/subresources.kubepcap.io/v1/namespaces/dev/packetcaptures/web/files/n1/{NAME}?uid={UID}"
    )


def test_an_agent_speaks_for_its_own_node_only() -> None:
    (one,) = read_answer(answer(file(node="n2", url="https://elsewhere")), node="n1", capture=CAPTURE)

    assert one.node == "n1"
    assert one.url == file_url(CAPTURE, "n1", NAME)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "should be an object"),
        (b"{}", "items: Field required"),
        (answer(file(size="many")), r"items\[0\].size"),
        (answer(file("../../etc/passwd")), "is no name of a capture file"),
        (answer(file(NAME + "\n")), "is no name of a capture file"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_answer(body, node="n1", capture=CAPTURE)


def test_a_name_with_every_character_that_is_allowed_needs_no_quoting_but_survives() -> None:
    name = "web-1_a.b@c+d=-20261201T100000.000000000Z-0a1b2c3d-0.pcap"

    assert file_url(CAPTURE, "n1", name).endswith(f"/files/n1/{name}?uid={UID}")
