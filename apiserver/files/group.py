"""The group `subresources.kubepcap.io/v1`: what it serves, described once."""

from typing import Any

from api.files import RESOURCE, SUBRESOURCE, PacketCaptureFileList
from api.names import is_dns_subdomain, is_file_name
from api.object import SUBRESOURCES_GROUP, VERSION
from api.schema import structural
from apiserver.aggregation.group import Endpoint, Group, Query, Resource, Segment, Subresource
from apiserver.files.download import PCAP, Download
from apiserver.files.listing import Listing
from kube.client import PACKETCAPTURES

LIST_KIND = "PacketCaptureFileList"

_UID = Query(name="uid", description="UID of the capture: if it is another one's by now, the answer is 410")
_NODE = Segment(
    name="node",
    description="name of the node on which the file lies",
    problem=lambda value: None if is_dns_subdomain(value) else "this is no name of a node",
)
_FILE = Segment(
    name="file",
    description="name of the file, as it is listed",
    problem=lambda value: None if is_file_name(value) else "this is no name of a capture file; list them to see theirs",
)


def subresources(listing: Listing, download: Download) -> Group:
    """The group, answered by these."""
    files = Subresource(
        name=SUBRESOURCE,
        kind=LIST_KIND,
        endpoints=(
            Endpoint(
                verb="get",
                handle=listing.handle,
                description="list the pcap files of a PacketCapture on all nodes",
                queries=(_UID,),
                answers=LIST_KIND,
            ),
            Endpoint(
                verb="get",
                handle=download.handle,
                description="download a pcap file of a PacketCapture",
                segments=(_NODE, _FILE),
                queries=(
                    _UID,
                    Query(name="offset", description="first byte to send, from 0", type="integer"),
                    Query(name="limit", description="number of bytes to send at most", type="integer"),
                ),
                content_type=PCAP,
                streams=True,
            ),
        ),
    )
    resource = Resource(
        name=RESOURCE, singular="packetcapture", kind=PACKETCAPTURES.kind, subresources=(files,), namespaced=True
    )
    return Group(name=SUBRESOURCES_GROUP, version=VERSION, resources=(resource,))


def schemas() -> dict[str, dict[str, Any]]:
    """The schemas of what the group answers, by kind."""
    return {LIST_KIND: structural(PacketCaptureFileList)}
