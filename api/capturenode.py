"""`CaptureNode`: what a node's agent says of itself and of each capture.

One writer per object: the agent of that node.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from api.object import Model, ObjectMeta, Timestamp
from api.packetcapture import LARGEST_COUNT, Phase

LONGEST_MESSAGE: Final = 512
LONGEST_REPORT: Final = 4096
"""Characters of a `NodeCapture` as it is written."""
MOST_REPORTS: Final = 2000

REASON: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{0,127}")
"""One word in CamelCase."""


def printable(text: str) -> str:
    """The text without what a terminal would obey: line breaks, escape codes, marks of direction."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _one_word(reason: str) -> str:
    if reason and REASON.fullmatch(reason) is None:
        raise ValueError("a reason is one word of letters and digits")
    return reason


Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


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

    namespace: Annotated[str, Field(max_length=63)]
    """The capture's namespace."""
    name: Annotated[str, Field(max_length=253)]
    """The capture's name."""
    uid: Annotated[str, Field(max_length=128)]
    """The capture's UID: another capture of the same name is another capture."""
    state: Phase
    """Its state on this node."""
    reason: Annotated[str, AfterValidator(_one_word)] = ""
    """Why, in one word."""
    message: Annotated[str, Field(max_length=LONGEST_MESSAGE), AfterValidator(printable)] = ""
    """Why, in words a person can act on."""
    pods: Count = 0
    """Pods that are captured."""
    files: Count = 0
    """Files of it that lie on this node."""
    packets: Count = 0
    """Packets written."""
    bytes: Count = 0
    """Size of its files."""
    dropped: Count = 0
    """Packets that passed the filter and were lost."""
    matched: Count = 0
    """Pods of this node that the selector matches, captured or not."""
    seen: Count = 0
    """Packets that the pods' interfaces counted meanwhile, whether or not the filter let them through."""
    evicted: Count = 0
    """Files removed to keep the disk's limits."""
    interruptions: Count = 0
    """Times that capturing was interrupted; what came until it went on is in no file."""
    interrupted_at: Timestamp | None = None
    """When that was last."""

    @classmethod
    def read(cls, report: str) -> "NodeCapture":
        """What `written` gave. Raises `ValueError`."""
        return cls.model_validate_json(report)

    def written(self) -> str:
        """As a string of JSON. As an object each costs kube-apiserver about 0.25 ms of CPU at every write of a
        CaptureNode, as a string 0.04 (measured with 100 captures); and all nodes write for each capture that begins.
        """
        document = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


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
    reports: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_REPORT)]],
        Field(max_length=MOST_REPORTS),
    ] = Field(default_factory=list)
    """Captures that are active on this node or have files on it; each is a JSON object with namespace, name, uid,
    state, reason, message and counters."""
    omitted: int = 0
    """Captures that there is no room to report."""


class CaptureNode(Model):
    """A node that captures, named after it."""

    metadata: ObjectMeta
    status: CaptureNodeStatus = Field(default_factory=CaptureNodeStatus)
    """What the node's agent says."""

    def capture(self, uid: str) -> NodeCapture | None:
        return next((capture for capture in self._readable(uid) if capture.uid == uid), None)

    def _readable(self, uid: str) -> Iterator[NodeCapture]:
        for report in self.status.reports:
            if uid in report:
                try:
                    yield NodeCapture.read(report)
                except ValueError:
                    continue  # the controller says so in the capture's status
