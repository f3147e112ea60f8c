"""Our API server and the Go sample server, side by side behind one kube-apiserver."""

import http.client
import itertools
import json
import re
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hack.clusters.bare import BareControlPlane
from hack.clusters.pki import Authority, Pair, kubeconfig
from hack.clusters.ports import free_port
from kube.certificates import KeyPair, ServerTLS
from kube.client import Json
from tests.cluster.aggregated import Server, World, installed, write_as_service_account
from tests.cluster.conformance.reviews import Reviews
from tests.cluster.sample import GROUP, RBAC, VERSION, sample_server

ALLOWED = "system:conformance"
"""Whoever is in this group may do everything, by RBAC: not `system:masters`, which the Go server asks nobody about."""


Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client sees of an answer, as far as two servers of different resources can agree on it."""

    code: int
    reason: str
    content_type: str

    def __str__(self) -> str:
        return " ".join(part for part in (str(self.code), self.reason, self.content_type) if part)

    @property
    def gives(self) -> bool:
        """Whether the client got what it asked for."""
        return 200 <= self.code < 400


NO_CONNECTION = Outcome(0, "", "")


@dataclass
class Side:
    """One of the two servers, with the names that stand for those in a path of the table."""

    server: Server
    reviews: Reviews
    names: dict[str, str]

    def path(self, template: str) -> str:
        """The table's path with the group `{G}`, version `{V}`, resource `{R}`, and `{F}` for our subresource."""
        for name, value in self.names.items():
            template = template.replace(f"{{{name}}}", value)
        return template

    def reviewed(self, user: str) -> list[Json]:
        """What kube-apiserver was asked about the user, in the table's names.

        A selector counts as one, however it is written: the Go server sends it parsed, ours leaves that to
        kube-apiserver, which does it with the same code.
        """
        return [self._in_common_names(spec) for spec in self.reviews.of(user)]

    def _in_common_names(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: bool(item) if key in ("fieldSelector", "labelSelector") else self._in_common_names(item)
                for key, item in value.items()
                if (key, item) != ("subresource", "files")
            }
        if isinstance(value, list):
            return [self._in_common_names(item) for item in value]
        for name in "GVR":
            if isinstance(value, str):
                value = re.sub(rf"(?<![^/]){re.escape(self.names[name])}(?![^/])", f"{{{name}}}", value)
        return value


@dataclass
class Servers:
    world: World
    ours: Side
    theirs: Side
    front_proxy: Pair
    _numbers: defaultdict[str, Iterator[int]] = field(default_factory=lambda: defaultdict(itertools.count))

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.ours, self.theirs

    def new_user(self, kind: str) -> str:
        """A name that no answer is kept for."""
        return f"{kind}-{next(self._numbers[kind])}"

    async def direct(
        self,
        side: Side,
        template: str,
        *,
        method: str = "GET",
        headers: Headers = (),
        certificate: Pair | None = None,
    ) -> Outcome:
        """Ask the server itself."""
        return await _outcome(side.server, side.path(template), method, headers, certificate)

    async def through(self, side: Side, template: str, *, method: str = "GET", headers: Headers = ()) -> Outcome:
        """Ask kube-apiserver; `headers` name the user, whom the admin impersonates."""
        return await _outcome(self.world.kube_apiserver, side.path(template), method, headers, self.world.admin)


async def _outcome(server: Server, path: str, method: str, headers: Headers, certificate: Pair | None) -> Outcome:
    try:
        answer = await server.ask(path, method=method, headers=headers, certificate=certificate)
    except (ssl.SSLError, ConnectionError, http.client.HTTPException):
        return NO_CONNECTION
    content_type = answer.headers.get("Content-Type", "")
    try:
        status = json.loads(answer.body)
    except ValueError:
        status = None
    is_status = isinstance(status, dict) and status.get("kind") == "Status"
    return Outcome(answer.code, status.get("reason", "") if is_status else "", content_type)


@asynccontextmanager
async def side_by_side(plane: BareControlPlane, directory: Path) -> AsyncIterator[Servers]:
    """Both servers, ready and available."""
    authority = Authority.create("reviews")
    async with AsyncExitStack() as stack:

        async def observed(name: str) -> tuple[Reviews, Path]:
            port = free_port()
            pair = authority.issue(name, hosts=["127.0.0.1"])
            tls = ServerTLS(client_certificates="none")
            tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key))
            upstream_ca = plane.authority.certificate
            reviews = await stack.enter_async_context(
                Reviews.observed(plane.url, upstream_ca=upstream_ca, port=port, tls=tls)
            )
            way = directory / f"{name}.kubeconfig"
            url = f"https://127.0.0.1:{port}"
            way.write_bytes(kubeconfig(cluster=name, server=url, ca=authority.certificate, user=name, pair=pair))
            return reviews, way

        our_reviews, our_way = await observed("ours")
        their_reviews, their_way = await observed("theirs")
        world = await stack.enter_async_context(installed(plane, directory, kubeconfig=our_way))
        way = directory / "sample.kubeconfig"
        await write_as_service_account(world, "kubepcap-apiserver", their_way, way)
        sample = await stack.enter_async_context(
            sample_server(world, directory, reviewing=way, rights=_rights(), flunders=("web", "other"))
        )
        our_names = {
            "F": "/files",
            "G": "subresources.kubepcap.io",
            "V": "v1",
            "R": "packetcaptures",
        }
        their_names = {
            "F": "",
            "G": GROUP,
            "V": VERSION,
            "R": "flunders",
        }
        yield Servers(
            world=world,
            ours=Side(world.apiserver, our_reviews, our_names),
            theirs=Side(sample.server, their_reviews, their_names),
            front_proxy=plane.front_proxy.issue("front-proxy-client"),
        )


def _rights() -> list[Json]:
    """The right to everything for those in `ALLOWED`."""
    return [
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": ALLOWED},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [
                {"apiGroup": RBAC, "kind": "Group", "name": ALLOWED},
                *({"apiGroup": RBAC, "kind": "User", "name": name} for name in allowed_users()),
            ],
        },
    ]


def allowed_users() -> Iterator[str]:
    """Users who may do everything without being in a group; each is asked about once."""
    return (f"allowed-{number}" for number in range(200))
