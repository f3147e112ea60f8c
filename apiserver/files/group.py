"""The group `subresources.kubepcap.io/v1`: what it serves, described once."""

from typing import Any

from api.files import RESOURCE, SUBRESOURCE, PacketCaptureFileList
from api.names import DNS_SUBDOMAIN_PATTERN, FILE_NAME_PATTERN, UID_PATTERN, is_dns_subdomain, is_file_name
from api.object import SUBRESOURCES_GROUP, VERSION
from api.schema import structural
from apiserver.aggregation.group import Endpoint, Group, Header, Query, Resource, Segment, Subresource
from apiserver.files.download import PCAP, Download
from apiserver.files.listing import Listing
from kube.client import PACKETCAPTURES

LIST_KIND = "PacketCaptureFileList"

_UID = Query(
    name="uid",
    description="UID of the capture: if it is another one's by now, the answer is 410",
    schema={"type": "string", "pattern": f"^{UID_PATTERN}$"},
)
_BYTES = {"type": "integer", "format": "int64", "minimum": 0, "maximum": 10**18 - 1}
_NODE = Segment(
    name="node",
    description="name of the node on which the file lies",
    problem=lambda value: None if is_dns_subdomain(value) else "this is no name of a node",
    schema={"type": "string", "pattern": f"^{DNS_SUBDOMAIN_PATTERN}$", "maxLength": 253},
)
_FILE = Segment(
    name="file",
    description="name of the file, as it is listed",
    problem=lambda value: None if is_file_name(value) else "this is no name of a capture file; list them to see theirs",
    schema={"type": "string", "pattern": f"^{FILE_NAME_PATTERN}$"},
)
_GONE = {
    404: "Not Found: there is no such capture",
    410: "Gone: the capture has another UID than the one given",
}


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
                answer_headers=(Header(name="Warning", description="which nodes did not answer"),),
                refusals=_GONE,
            ),
            Endpoint(
                verb="get",
                handle=download.handle,
                description="download a pcap file of a PacketCapture",
                segments=(_NODE, _FILE),
                queries=(
                    _UID,
                    Query(name="offset", description="first byte to send, from 0", schema=_BYTES),
                    Query(name="limit", description="number of bytes to send at most", schema=_BYTES),
                ),
                headers=(
                    Header(name="Range", description="the bytes to send (RFC 9110, 14.2), instead of offset and limit"),
                    Header(name="If-Range", description="ETag of the file of which Range asks for more"),
                    Header(name="If-None-Match", description="ETag of a finished file that the client has"),
                ),
                content_type=PCAP,
                answer_headers=(
                    Header(name="Accept-Ranges", description="bytes"),
                    Header(name="Content-Range", description="which bytes of how many are sent"),
                    Header(name="ETag", description="names the file; the same while it grows"),
                    Header(name="Kubepcap-Size", description="bytes of the whole file"),
                    Header(name="Kubepcap-Sha256", description="hash of the whole file, hexadecimal, once finished"),
                ),
                successes={
                    200: "OK: the file, or the part that offset and limit ask for",
                    206: "Partial Content: the part that Range asks for",
                    304: "Not Modified: the client has the file",
                },
                refusals={
                    404: "Not Found: there is no such capture, or it has no such file on this node",
                    410: _GONE[410],
                    416: "Range Not Satisfiable: the file has no such part; Content-Range says how long it is",
                    503: "Service Unavailable: the node's agent does not answer",
                },
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
