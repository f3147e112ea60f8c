"""The capture's spec: what is read, and what is refused in which words."""

from typing import Any

import pytest
from pydantic import ValidationError

from api.object import explain
from api.packetcapture import NodeSummary, PacketCapture, PacketCaptureSpec, PacketCaptureStatus


def test_a_manifest_of_calico_is_read() -> None:
    capture = PacketCapture.model_validate(
        {
            "apiVersion": "kubepcap.io/v1",
            "kind": "PacketCapture",
            "metadata": {"name": "sample", "namespace": "dev"},
            "spec": {
                "selector": 'k8s-app == "nginx"',
                "filters": [{"protocol": "TCP", "ports": [80]}, {"protocol": "17", "ports": ["53"]}],
                "startTime": "2026-12-01T10:00:00Z",
                "endTime": "2026-12-01T10:15:00Z",
            },
        }
    )
    assert capture.spec.pods().matches({"k8s-app": "nginx"})
    assert [entry.ports for entry in capture.spec.filters] == [[(80, 80)], [(53, 53)]]
    assert capture.spec.rotation.max_files == 2


def test_a_spec_is_written_as_it_was_read() -> None:
    given = {
        "podSelector": {"matchLabels": {"app": "x"}},
        "filters": [{"protocol": "TCP", "ports": [80, "8000:8100"]}],
        "endTime": "2026-12-01T10:15:00Z",
        "rotation": {"maxFileSize": "10Mi", "maxFileAge": "1h"},
    }
    written = PacketCaptureSpec.model_validate(given).model_dump(mode="json", exclude_unset=True)
    assert written == given | {"rotation": {"maxFileSize": 10 * 2**20, "maxFileAge": "1h0m0s"}}


SOUND = {"selector": "app == 'x'"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selector": None}, "spec: give exactly one of selector and podSelector"),
        ({"podSelector": {}}, "spec: give exactly one of selector and podSelector"),
        ({"selector": "app = 'x'"}, "spec: selector: column 5: unexpected character '=': write =="),
        ({"filters": [{"ports": [70000]}]}, "spec.filters[0].ports[0]: 70000 is no port: ports go from 1 to 65535"),
        ({"filters": [{"ports": [0]}]}, "spec.filters[0].ports[0]: 0 is no port: ports go from 1 to 65535"),
        (
            {"filters": [{"ports": ["http"]}]},
            "spec.filters[0].ports[0]: 'http' is no port: give a number from 1 to 65535, "
            'or a range such as "8000:8100"',
        ),
        (
            {"filters": [{"ports": ["90:80"]}]},
            "spec.filters[0].ports[0]: '90:80' is no range of ports: the first is above the last",
        ),
        (
            {"filters": [{"protocol": "HTTP"}]},
            "spec.filters[0].protocol: 'HTTP' is no protocol: give TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite "
            "or a number from 1 to 255",
        ),
        (
            {"filters": [{"protocol": "ICMP", "ports": [80]}]},
            "spec.filters[0]: ports can't be matched with protocol ICMP: only TCP, UDP and SCTP have them",
        ),
        (
            {"startTime": "2026-12-01T10:00:00Z", "endTime": "2026-12-01T10:00:00Z"},
            "spec: endTime must be after startTime",
        ),
        (
            {"filters": [{"protocol": "TCP", "ports": list(range(start, start + 60))} for start in range(1, 600, 100)]},
            "spec: filters name 360 ports and ranges, and at most 256 can be compiled for the kernel: "
            "give ranges, or fewer",
        ),
        (
            {"rotation": {"maxFileSize": 1000}},
            "spec: rotation.maxFileSize must be at least snapLength + 40 bytes, here 262184",
        ),
        (
            {"rotation": {"maxFileSize": "10MB"}},
            "spec.rotation.maxFileSize: '10MB' is no size: give bytes, or a number with k, M, G, Ki, Mi or Gi, "
            "such as 10M",
        ),
        ({"endTime": "9999-12-31T23:59:59-14:00"}, "spec.endTime: give a time between the years 1970 and 9000"),
        ({"startTime": "9999-12-31T10:00:00Z"}, "spec.startTime: give a time between the years 1970 and 9000"),
        ({"snapLength": 10}, "spec.snapLength: Input should be greater than or equal to 64"),
    ],
)
def test_what_is_wrong_is_refused_in_words_that_say_what_to_change(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        PacketCaptureSpec.model_validate(SOUND | change)
    assert explain(refusal.value, root="spec") == message


@pytest.mark.parametrize(
    "text", ["tcp or host 10.0.0.1", "TCP\n", "TCP or 1", "\0", "$(id)", "-w/tmp/x", "٦", "0x6", "256", "-1", " 6"]
)
def test_no_words_of_a_users_pass_for_a_protocol(text: str) -> None:
    with pytest.raises(ValidationError, match="is no protocol"):
        PacketCaptureSpec.model_validate(SOUND | {"filters": [{"protocol": text}]})


@pytest.mark.parametrize(
    "text", ["80 or net 0.0.0.0/0", "1:2;id", "80\n", "1:2:3", "", ":", "80:", ":80", "8٠", "0x50", "-80", " 80", "1-2"]
)
def test_no_words_of_a_users_pass_for_a_port(text: str) -> None:
    with pytest.raises(ValidationError, match="port"):
        PacketCaptureSpec.model_validate(SOUND | {"filters": [{"ports": [text]}]})


def test_the_status_names_of_a_node_only_what_there_is_to_say() -> None:
    status = PacketCaptureStatus(packets=0, nodes=[NodeSummary(node="a", state="Capturing", pods=1)])
    written = status.to_json()
    assert written["packets"] == 0
    assert written["nodes"] == [{"node": "a", "state": "Capturing", "pods": 1}]
    assert PacketCaptureStatus.model_validate(written) == status


def test_a_spec_of_megabytes_is_refused_unread() -> None:
    labels = {f"key{number}": "not a value!" for number in range(50_000)}
    with pytest.raises(ValidationError, match="it is longer than 262,144 characters") as refusal:
        PacketCaptureSpec.model_validate({"podSelector": {"matchLabels": labels}})
    assert refusal.value.error_count() == 1
