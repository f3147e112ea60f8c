"""Names of files and nodes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import names

UID = "0b5f3c2e-8a51-4d5e-9c43-1f0a2b3c4d5e"
MOMENT = 1_796_000_000_123_456_789


def test_a_file_is_named_after_pod_interface_time_uid_and_sequence() -> None:
    name = names.file_name(pod="dev-nginx-1", interface="eth0", created_ns=MOMENT, pod_uid=UID, sequence=7)
    assert name == "dev-nginx-1_eth0-20261130T005320.123456789Z-0b5f3c2e-7.pcap"
    assert names.is_file_name(name)


@given(
    pod=st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?){0,2}", fullmatch=True),
    interface=st.text(min_size=1, max_size=15).filter(lambda text: text.strip() == text),
    sequence=st.integers(0, 10**9),
)
def test_every_pod_and_interface_gives_a_name_that_is_safe_in_a_path(pod: str, interface: str, sequence: int) -> None:
    name = names.file_name(pod=pod, interface=interface, created_ns=MOMENT, pod_uid=UID, sequence=sequence)
    assert names.is_file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_.@+=-]{1,250}", name)
    assert not name.startswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "../x_eth0-20261130T005320.123456789Z-0b5f3c2e-7.pcap",
        "a/b_eth0-20261130T005320.123456789Z-0b5f3c2e-7.pcap",
        "a_eth0-20261130T005320.123456789Z-0b5f3c2e-7.pcap\n",
        "a_eth0-20261130T005320.123456789Z-0b5f3c2e-7.pcap.json",
        "a%2f_eth0-20261130T005320.123456789Z-0b5f3c2e-7.pcap",
        "passwd",
    ],
)
def test_a_foreign_name_is_no_file_name(text: str) -> None:
    assert not names.is_file_name(text)


@pytest.mark.parametrize(
    ("pod", "uid"), [("../x", UID), ("Upper", UID), ("", UID), ("pod", "x"), ("pod", UID.upper()), ("pod", "../" + UID)]
)
def test_names_that_kubernetes_would_not_give_make_no_file_name(pod: str, uid: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        names.file_name(pod=pod, interface="eth0", created_ns=MOMENT, pod_uid=uid, sequence=0)


def test_times_are_written_with_nanoseconds() -> None:
    assert names.format_time(MOMENT) == "2026-11-30T00:53:20.123456789Z"


@pytest.mark.parametrize(
    ("text", "valid"),
    [("node-a", True), ("node.a", True), ("", False), ("..", False), ("A", False), ("a" * 254, False)],
)
def test_nodes_are_dns_subdomains(text: str, valid: bool) -> None:
    assert names.is_dns_subdomain(text) is valid


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("a" * 16, True),
        ("a1" * 31, True),
        ("a" * 15, False),
        ("a" * 64, False),
        ("A" * 16, False),
        ("../" + "a" * 16, False),
    ],
)
def test_the_webhooks_path_is_long_and_a_dns_label(text: str, valid: bool) -> None:
    assert names.is_webhook_path(text) is valid
