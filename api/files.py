"""`PacketCaptureFileList`: what `packetcaptures/files` answers."""

from typing import Literal

from pydantic import Field

from api.object import SUBRESOURCES_GROUP, VERSION, Model, Timestamp

RESOURCE = "packetcaptures"
SUBRESOURCE = "files"


class PacketCaptureFile(Model):
    """One pcap file on one node."""

    node: str
    """The node on which it lies."""
    pod: str
    """The pod whose packets it holds."""
    interface: str
    """The pod's network interface."""
    name: str
    """The file's name, which never changes."""
    size: int
    """Bytes that can be read now; a file that is being written ends with a whole packet there."""
    packets: int
    """Packets in it."""
    received: int | None = None
    """Packets that passed the filter while it was written."""
    dropped: int
    """Packets that passed the filter and were lost while it was written."""
    first_packet_time: str | None = None
    """Time of the first packet (RFC 3339, nanoseconds)."""
    last_packet_time: str | None = None
    """Time of the last packet (RFC 3339, nanoseconds)."""
    sha256: str | None = None
    """Hash of the whole file, hexadecimal, once it is finished."""
    state: Literal["Writing", "Finished"]
    """Whether it may still grow."""
    url: str | None = None
    """The path under kube-apiserver that downloads it."""


class Unanswered(Model):
    """A node that has files of the capture, or should have, and could not be asked."""

    node: str
    """The node."""
    message: str
    """Why it did not answer."""


class CaptureReference(Model):
    """The capture whose files are listed."""

    namespace: str
    name: str
    uid: str


class PacketCaptureFileList(Model):
    """The files of a capture, on all nodes."""

    kind: Literal["PacketCaptureFileList"] = "PacketCaptureFileList"
    api_version: str = f"{SUBRESOURCES_GROUP}/{VERSION}"
    metadata: dict[str, str] = Field(default_factory=dict)
    capture: CaptureReference
    """The capture."""
    time: Timestamp
    """When the nodes were asked."""
    items: list[PacketCaptureFile]
    """The files, by node and name."""
    unanswered: list[Unanswered] = Field(default_factory=list)
    """The nodes that did not answer: files on them are missing here."""
