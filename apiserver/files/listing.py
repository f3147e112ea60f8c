"""`GET …/packetcaptures/NAME/files`: the files of a capture on all nodes, and the nodes that did not answer."""

import asyncio
import json
from collections.abc import Iterable
from datetime import UTC, datetime

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from api.capturenode import CaptureNode
from api.files import CaptureReference, PacketCaptureFile, PacketCaptureFileList, Unanswered
from api.names import is_file_name
from api.object import Model, explain
from apiserver.aggregation.group import Call
from apiserver.files.agents import AgentError, Agents
from apiserver.files.capture import file_url, read
from kube.client import Client
from kube.status import StatusError
from kube.watch import Cache

_AT_A_TIME = 32
_PATIENCE = 10.0
# kube-apiserver cuts a request after 60 s.
_DUE_AFTER = 30.0
_LARGEST_ANSWER = 8 * 1024 * 1024
_LARGEST_REFUSAL = 4096


class _Answer(Model):
    """What an agent says."""

    items: list[PacketCaptureFile]


class Listing:
    """Asks, of every node that says it has to do with a capture, what files of it are there."""

    def __init__(self, client: Client, *, nodes: Cache[CaptureNode], agents: Agents) -> None:
        self._client = client
        self._nodes = nodes
        self._agents = agents

    async def handle(self, call: Call) -> web.StreamResponse:
        capture = await read(self._client, call)
        listed = await self.files(capture)
        if listed.unanswered:
            missing = ", ".join(unanswered.node for unanswered in listed.unanswered[:5])
            call.warnings.append(f"{len(listed.unanswered)} nodes did not answer, their files are missing: {missing}")
        body = json.dumps(listed.to_json()).encode()
        return web.Response(body=body, content_type="application/json")  # as Kubernetes: no charset, JSON is UTF-8

    async def files(self, capture: CaptureReference) -> PacketCaptureFileList:
        """The files, sorted by node and name."""
        moment = datetime.now(UTC)
        due = asyncio.get_running_loop().time() + _DUE_AFTER
        at_a_time = asyncio.Semaphore(_AT_A_TIME)

        async def ask(node: str) -> list[PacketCaptureFile] | Unanswered:
            try:
                async with asyncio.timeout_at(due), at_a_time:
                    return await self.files_on(node, capture)
            except AgentError as error:
                return Unanswered(node=node, message=str(error))
            except TimeoutError:
                return Unanswered(node=node, message="too many other nodes did not answer; ask again")

        nodes = nodes_with(capture.uid, self._nodes.objects.values())
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(node), name=f"files on {node}") for node in nodes]
        answers = [task.result() for task in asked]
        unreadable = [  # the reason may quote another namespace's captures; the log has it
            Unanswered(node=key.name, message="its CaptureNode can't be read") for key in sorted(self._nodes.unparsable)
        ]
        return PacketCaptureFileList(
            capture=capture,
            time=moment,
            items=[file for answer in answers if not isinstance(answer, Unanswered) for file in answer],
            unanswered=[answer for answer in answers if isinstance(answer, Unanswered)] + unreadable,
        )

    async def files_on(self, node: str, capture: CaptureReference) -> list[PacketCaptureFile]:
        """The capture's files on one node, sorted by name. Raises `AgentError`."""
        try:
            async with (
                asyncio.timeout(_PATIENCE),
                self._agents.request(node, f"/captures/{capture.uid}/files") as response,
            ):
                if response.status == 404:
                    return []
                if response.status != 200:
                    refusal = StatusError.parse(response.status, await response.content.read(_LARGEST_REFUSAL))
                    raise AgentError(f"the agent of node {node} refused: {refusal.message}")
                body = await _read_at_most(response, _LARGEST_ANSWER)
        except TimeoutError as error:
            raise AgentError(f"the agent of node {node} did not answer within {_PATIENCE:.0f} s") from error
        except aiohttp.ClientError as error:
            raise AgentError(f"the answer of the agent of node {node} broke off: {error}") from error
        try:
            return read_answer(body, node=node, capture=capture)
        except ValueError as error:
            raise AgentError(f"the answer of the agent of node {node} can't be read: {error}") from error


def nodes_with(uid: str, nodes: Iterable[CaptureNode]) -> list[str]:
    """The nodes that say they have to do with the capture, sorted."""
    return sorted(node.metadata.name for node in nodes if node.capture(uid) is not None)


def read_answer(body: bytes, *, node: str, capture: CaptureReference) -> list[PacketCaptureFile]:
    """Read an agent's answer. Whatever it says, the files are its own node's, and their URLs of our making.

    Raises `ValueError`.
    """
    try:
        files = _Answer.model_validate_json(body).items
    except ValidationError as error:
        raise ValueError(explain(error)) from error
    for file in files:
        if not is_file_name(file.name):
            raise ValueError(f"{json.dumps(file.name)} is no name of a capture file")
    return [
        file.model_copy(update={"node": node, "url": file_url(capture, node, file.name)})
        for file in sorted(files, key=lambda file: file.name)
    ]


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise aiohttp.ClientPayloadError(f"it is larger than {limit} bytes")
    return bytes(body)
