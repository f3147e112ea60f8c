"""`GET …/packetcaptures/NAME/files/NODE/FILE`: one file, streamed from the node's agent to the client.

Nothing of it is gathered here: what the agent sends is passed on as it comes, and the client's pace is the agent's.
When the agent breaks off, so does the answer, and its size and hash in the headers tell the client what is missing.
"""

from collections.abc import Mapping, Sequence

import aiohttp
from aiohttp import hdrs, web

from api.capturenode import CaptureNode
from api.files import CaptureReference
from apiserver.aggregation.group import Call
from apiserver.aggregation.server import answer
from apiserver.files.agents import AgentError, Agents
from apiserver.files.capture import files_url, read
from apiserver.files.listing import Listing, nodes_with
from kube.client import Client
from kube.status import StatusError, bad_request, not_found, service_unavailable
from kube.watch import Cache

PCAP = "application/vnd.tcpdump.pcap"

_ASKED = (hdrs.RANGE, hdrs.IF_RANGE, hdrs.IF_NONE_MATCH, hdrs.IF_MATCH)
_ANSWERED = (
    hdrs.ACCEPT_RANGES,
    hdrs.CONTENT_LENGTH,
    hdrs.CONTENT_RANGE,
    hdrs.ETAG,
    "Kubepcap-Size",
    "Kubepcap-Sha256",
)
_MOST_NAMED = 5
_LARGEST_REFUSAL = 4096


class Download:
    """Passes one file on."""

    def __init__(self, client: Client, *, nodes: Cache[CaptureNode], agents: Agents, listing: Listing) -> None:
        self._client = client
        self._nodes = nodes
        self._agents = agents
        self._listing = listing

    async def handle(self, call: Call) -> web.StreamResponse:
        asked = call.request.headers
        query = piece(call.info.query, has_range=hdrs.RANGE in asked)
        node, name = call.segments["node"], call.segments["file"]
        capture = await read(self._client, call)
        if self._agents.address(node) is None:
            self._refuse_node(node, capture)
        try:
            async with self._agents.request(
                node,
                f"/captures/{capture.uid}/files/{name}",
                method=call.request.method,
                headers={header: asked[header] for header in _ASKED if header in asked},
                query=query,
            ) as file:
                if file.status == 404:
                    raise await self._missing(node, name, capture)
                if file.status not in (200, 206, 304):
                    return _refuse(file, refusal(node, file.status, await file.content.read(_LARGEST_REFUSAL)))
                return await _pass_on(call.request, file, name)
        except AgentError as error:
            raise service_unavailable(str(error)) from error

    def _refuse_node(self, node: str, capture: CaptureReference) -> None:
        nodes = nodes_with(capture.uid, self._nodes.objects.values())
        if node in nodes:
            raise service_unavailable(
                f"node {node} has no running agent at the moment, and the file lies there; "
                f"kubectl -n {self._agents.namespace} get pods -o wide shows the agents"
            )
        raise not_found(
            "nodes", node, hint=f"files of this capture are on {named(nodes)}; {files_url(capture)} lists them"
        )

    async def _missing(self, node: str, name: str, capture: CaptureReference) -> StatusError:
        files = await self._listing.files_on(node, capture)
        there = named([file.name for file in files])
        hint = f"files of this capture on node {node} are {there}; {files_url(capture)} lists all"
        return not_found("packetcaptures/files", name, hint=hint)


def piece(query: Mapping[str, Sequence[str]], *, has_range: bool) -> dict[str, str]:
    """The part of the file that `?offset=` and `?limit=` ask for, as kubectl can't send a Range header.

    Raises `StatusError` 400 for what is no number of bytes.
    """
    asked = {name: query[name][0] for name in ("offset", "limit") if name in query}
    for name, value in asked.items():
        if not (value.isascii() and value.isdigit() and len(value) <= 18):
            raise bad_request(f"{name} must be a number of bytes, not {value!r}")
    if asked and has_range:
        raise bad_request("give a Range header or offset and limit, not both")
    return asked


def refusal(node: str, status: int, body: bytes) -> StatusError:
    """What the client is told when the agent refuses: what is its own fault as it is, the rest as ours."""
    said = StatusError.parse(status, body)
    if status in (400, 412, 416, 429):
        return said
    return service_unavailable(f"the agent of node {node} can't give the file: {said.message}")


def named(names: Sequence[str]) -> str:
    """Names for a message, not too many of them."""
    if not names:
        return "none"
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"


def _refuse(file: aiohttp.ClientResponse, error: StatusError) -> web.StreamResponse:
    refused = answer(error)
    if error.code == 416 and hdrs.CONTENT_RANGE in file.headers:
        refused.headers[hdrs.CONTENT_RANGE] = file.headers[
            hdrs.CONTENT_RANGE
        ]  # how long the file is (RFC 9110, 15.5.17)
    return refused


async def _pass_on(request: web.Request, file: aiohttp.ClientResponse, name: str) -> web.StreamResponse:
    passed = web.StreamResponse(status=file.status)
    for header in _ANSWERED:
        if header in file.headers:
            passed.headers[header] = file.headers[header]
    if file.status != 304:
        passed.headers[hdrs.CONTENT_TYPE] = PCAP
        passed.headers[hdrs.CONTENT_DISPOSITION] = f'attachment; filename="{name}"'
    await passed.prepare(request)
    async for chunk in file.content.iter_any():
        await passed.write(chunk)
    await passed.write_eof()
    return passed
