"""Messages survive the way over the socket, and nothing else is taken for a message."""

import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.capturer.protocol import (
    Changed,
    FileStatus,
    InterfaceStatus,
    Message,
    ProtocolError,
    Reply,
    Report,
    Start,
    State,
    Stop,
    Target,
    TargetStatus,
    decode,
    encode,
)

numbers = st.integers(0, 2**62)
uids = st.uuids().map(str)
targets = st.builds(
    Target,
    capture_uid=uids,
    pod_uid=uids,
    pod_name=st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True),
    pod_addresses=st.lists(st.ip_addresses().map(str), min_size=1).map(tuple),
    interfaces=st.lists(st.from_regex(r"[^\s/\x00]{1,15}", fullmatch=True)).map(tuple),
    filter=st.text(),
    snap_length=st.integers(1, 262144),
    ring_bytes=st.integers(1 << 19, 1 << 30),
    max_file_bytes=st.integers(300_000, 1 << 50),
    max_file_age_seconds=st.integers(0, 1 << 31),
    max_files=st.integers(1, 100_000),
    until=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
files = st.builds(
    FileStatus,
    name=st.text(),
    interface=st.text(),
    created=numbers,
    size=numbers,
    packets=numbers,
    dropped=numbers,
    last_batch_offset=numbers,
    closed=st.none() | st.integers(0, 2**63),
)
interfaces = st.builds(
    InterfaceStatus,
    interface=st.text(),
    state=st.sampled_from(State),
    reason=st.text(),
    message=st.text(),
    packets=numbers,
    dropped=numbers,
    files=st.lists(files, max_size=3).map(tuple),
)
statuses = st.builds(
    TargetStatus,
    target=targets,
    started=numbers,
    state=st.sampled_from(State),
    reason=st.text(),
    message=st.text(),
    interfaces=st.lists(interfaces, max_size=3).map(tuple),
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Start, request=numbers, target=targets),
    st.builds(Stop, request=numbers, id=st.text()),
    st.builds(Report, request=numbers, ids=st.none() | st.lists(st.text()).map(tuple), flush=st.booleans()),
    st.builds(Reply, request=numbers, targets=st.lists(statuses, max_size=3).map(tuple), error=st.text()),
    st.builds(Changed, target=statuses),
)


@given(messages)
def test_a_message_is_one_line_and_survives(message: Message) -> None:
    line = encode(message)
    assert line.index(b"\n") == len(line) - 1
    assert decode(line) == message


@given(st.binary())
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


def start(**changes: object) -> bytes:
    target: dict[str, object] = {
        "capture_uid": str(uuid.uuid4()),
        "pod_uid": str(uuid.uuid4()),
        "pod_name": "web-0",
        "pod_addresses": ["10.0.0.1"],
    }
    return json.dumps({"kind": "Start", "request": 1, "target": target | changes}).encode()


def test_what_is_left_out_has_its_default() -> None:
    message = decode(start())
    assert isinstance(message, Start)
    assert message.target.max_files == 2


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"[]", "kind must be one of"),
        (b'{"kind":"Halt"}', "kind must be one of"),
        (b'{"kind":"Stop","id":"x"}', "Stop is incomplete"),
        (b'{"kind":"Stop","request":true,"id":"x"}', r"Stop\.request must be of type int"),
        (b'{"kind":"Stop","request":1,"id":"x","more":1}', "Stop has no field 'more'"),
        (start(capture_uid="../../etc"), "capture_uid"),
        (start(pod_uid=""), "pod_uid"),
        (start(pod_name="a/b"), "pod_name"),
        (start(pod_name=".."), "pod_name"),
        (start(pod_addresses=[]), "one address at least"),
        (start(pod_addresses=["localhost"]), "pod_addresses"),
        (start(interfaces=["a/b"]), "interface"),
        (start(interfaces="eth0"), r"Start\.target\.interfaces must be a list"),
        (start(snap_length=0), "snap_length must be from 1 to 262144"),
        (start(snap_length=65535, max_file_bytes=65535), "max_file_bytes must be from 65575"),
        (start(max_files=0), "max_files"),
        (start(ring_bytes=1), "ring_bytes"),
    ],
)
def test_a_bad_message_is_refused_with_the_reason(line: bytes, error: str) -> None:
    with pytest.raises(ProtocolError, match=error):
        decode(line)
