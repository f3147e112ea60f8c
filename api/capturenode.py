"""`CaptureNode`: what a node's agent says of itself and of each capture.

One writer per object: the agent of that node.
"""

import json
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from api.object import Model, ObjectMeta, Timestamp
from api.packetcapture import Phase

LONGEST_MESSAGE = 512


class Disk(Model):
    """The file system that holds the capture files, in bytes."""

    capacity: int
    """Its size."""
    free: int
    """What is free of it."""
    used: int
    """What capture files take of it."""


class NodeCapture(Model):
    """One capture, as seen from this node."""

    namespace: str
    """The capture's namespace."""
    name: str
    """The capture's name."""
    uid: str
    """The capture's UID: another capture of the same name is another capture."""
    state: Phase
    """Its state on this node."""
    reason: Annotated[str, Field(max_length=128)] = ""
    """Why, in one word."""
    message: Annotated[str, Field(max_length=LONGEST_MESSAGE)] = ""
    """Why, in words a person can act on."""
    pods: int = 0
    """Pods that are captured."""
    files: int = 0
    """Files of it that lie on this node."""
    packets: int = 0
    """Packets written."""
    bytes: int = 0
    """Size of its files."""
    dropped: int = 0
    """Packets that passed the filter and were lost."""
    matched: int = 0
    """Pods of this node that the selector matches, captured or not."""
    seen: int = 0
    """Packets that the pods' interfaces counted meanwhile, whether or not the filter let them through."""
    evicted: int = 0
    """Files removed to keep the disk's limits."""
    interruptions: int = 0
    """Times that the capturer died; what came until it was back is in no file."""
    interrupted_at: Timestamp | None = None
    """When it was last back after that."""


def _read(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


def _write(capture: NodeCapture) -> str:
    document = capture.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


WrittenCapture = Annotated[
    NodeCapture,
    BeforeValidator(_read),
    PlainSerializer(_write, return_type=str),
    WithJsonSchema({"type": "string", "maxLength": 4096}),
]
"""A `NodeCapture` as a string of JSON. As an object each costs kube-apiserver about 0.25 ms of CPU at every write of
a CaptureNode, as a string 0.04 (measured with 100 captures); and all nodes write for each capture that begins."""


class Capturer(Model):
    """The part of the agent that captures."""

    restarts: int = 0
    """Times that it died since the agent began."""
    interfaces: int = 0
    """Interfaces that it captures."""
    ring_bytes: int = 0
    """Kernel memory that their rings take."""


class CaptureNodeStatus(Model):
    """Written by the node's agent alone."""

    heartbeat_time: Timestamp | None = None
    """When the agent last said anything."""
    pod: str = ""
    """The agent's pod."""
    version: str = ""
    """The agent's version."""
    disk: Disk | None = None
    """The file system that holds the capture files."""
    capturer: Capturer | None = None
    """The part of the agent that captures; absent while it can't be reached."""
    captures: Annotated[list[WrittenCapture], Field(max_length=2000)] = Field(default_factory=list)
    """Captures that concern this node, as they match a pod of it or have files on it; each is a JSON object with
    namespace, name, uid, state, reason, message and counters."""


class CaptureNode(Model):
    """A node that captures, named after it."""

    metadata: ObjectMeta
    status: CaptureNodeStatus = Field(default_factory=CaptureNodeStatus)
    """What the node's agent says."""

    def capture(self, uid: str) -> NodeCapture | None:
        return next((capture for capture in self.status.captures if capture.uid == uid), None)
