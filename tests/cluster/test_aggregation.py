"""The library alone: a group that has nothing to do with captures, behind a real kube-apiserver.

That kube-apiserver gives up on a request after four seconds, unless the request is long-running in its eyes.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from apiserver.aggregation.authentication import Authenticator
from apiserver.aggregation.authorization import Authorizer
from apiserver.aggregation.group import Call, Endpoint, Group, Resource, Subresource
from apiserver.aggregation.metrics import Metrics
from apiserver.aggregation.server import Server as AggregatedServer
from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.pki import Authority, Pair
from kube.certificates import KeyPair, ServerTLS
from kube.client import APISERVICES, Client
from kube.client import Resource as Kind
from kube.serve import listening
from tests.cluster.aggregated import Answer, Headers, Server, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST_SECONDS = 4
GROUP = "things.example"
VERSION = f"/apis/{GROUP}/v1"
THING = "namespaces/default/things/x"
HOST = "things.default.svc"
RBAC = "rbac.authorization.k8s.io"
ROLES = Kind(RBAC, "v1", "roles", "Role", namespaced=True)
ROLEBINDINGS = Kind(RBAC, "v1", "rolebindings", "RoleBinding", namespaced=True)
SERVICES = Kind("", "v1", "services", "Service", namespaced=True)
TICKS = b"tick\n"
MASTERS = [("Impersonate-Group", "system:masters")]


async def who(call: Call) -> web.StreamResponse:
    """The user, as they arrived."""
    user = call.user
    extra = {key: list(values) for key, values in user.extra.items()}
    return web.json_response({"name": user.name, "uid": user.uid, "groups": list(user.groups), "extra": extra})


async def feed(call: Call) -> web.StreamResponse:
    """Never ends by itself."""
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(call.request)
    while True:
        await response.write(TICKS)
        await asyncio.sleep(0.05)


THINGS = Group(
    name=GROUP,
    version="v1",
    resources=(
        Resource(
            name="things",
            singular="thing",
            kind="Thing",
            subresources=(
                Subresource(
                    name="feed",
                    kind="Tick",
                    endpoints=tuple(
                        Endpoint(verb=verb, handle=feed, description="ticks", content_type="text/plain", streams=True)
                        for verb in ("get", "watch")
                    ),
                ),
                Subresource(
                    name="who",
                    kind="User",
                    endpoints=(Endpoint(verb="get", handle=who, description="the user", answers="User"),),
                ),
            ),
        ),
    ),
)


@dataclass
class World:
    client: Client
    plane: BareControlPlane
    kube_apiserver: Server
    admin: Pair
    server: Server
    metrics: Metrics

    async def ask(self, path: str, *, user: str, method: str = "GET", headers: Headers = ()) -> Answer:
        """Through kube-apiserver as some user, whom the admin impersonates."""
        return await self.kube_apiserver.ask(
            path, method=method, headers=[("Impersonate-User", user), *headers], certificate=self.admin
        )

    @asynccontextmanager
    async def following(self, path: str, *, user: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The same for what does not end."""
        async with (
            aiohttp.ClientSession(headers={"Impersonate-User": user}) as session,
            session.get(f"{self.plane.url}{path}", ssl=self.kube_apiserver.tls(self.admin)) as response,
        ):
            assert response.status == 200, await response.read()
            yield response

    async def allow(self, user: str, verb: str, resource: str = "things/feed") -> str:
        """Give a right by a RoleBinding, and wait until it counts; gives the RoleBinding's name."""
        name = f"{user}-{verb}"
        rule = {"apiGroups": [GROUP], "resources": [resource], "verbs": [verb]}
        role = {"metadata": {"name": name}, "rules": [rule]}
        await self.client.create(ROLES, role, namespace="default")
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": name},
            "subjects": [{"apiGroup": RBAC, "kind": "User", "name": user}],
        }
        await self.client.create(ROLEBINDINGS, binding, namespace="default")
        return name


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    directory = tmp_path_factory.mktemp("aggregation-plane")
    with bare_control_plane(directory, f"--request-timeout={REQUEST_SECONDS}s") as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(plane: BareControlPlane) -> AsyncIterator[World]:
    authority = Authority.create("things-ca")
    tls = ServerTLS(client_certificates="optional")
    pair = authority.issue("things", hosts=[HOST])
    tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key))
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(user_agent="test", kubeconfig=plane.kubeconfig))
        authenticator = Authenticator(client, on_trust=lambda ca: tls.use(client_ca=ca))
        authorizer = Authorizer(client)
        metrics = Metrics()
        server = AggregatedServer(
            groups=[THINGS],
            schemas={"User": {"type": "object"}},
            title="things",
            version="v1",
            authenticator=authenticator,
            authorizer=authorizer,
            checks={},
            metrics=metrics,
        )
        for run in (authenticator.run, authorizer.run):
            task = asyncio.create_task(run(), name="server's background")
            stack.callback(task.cancel)
        port = await stack.enter_async_context(
            listening(server.application(), port=0, host="127.0.0.1", tls=tls, grace=0)
        )
        world = World(
            client=client,
            plane=plane,
            kube_apiserver=Server(
                "127.0.0.1", int(plane.url.rpartition(":")[2]), "localhost", plane.authority.certificate.decode()
            ),
            admin=plane.authority.issue("admin", groups=["system:masters"]),
            server=Server("127.0.0.1", port, HOST, authority.certificate.decode()),
            metrics=metrics,
        )
        await _register(world, authority, port)
        yield world


async def _register(world: World, authority: Authority, port: int) -> None:
    service = {"metadata": {"name": "things"}}
    external = {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}
    await world.client.create(SERVICES, service | {"spec": external}, namespace="default")
    spec = {
        "group": GROUP,
        "version": "v1",
        "groupPriorityMinimum": 100,
        "versionPriority": 100,
        "caBundle": base64.b64encode(authority.certificate).decode(),
        "service": {"namespace": "default", "name": "things", "port": port},
    }
    await world.client.create(APISERVICES, {"metadata": {"name": f"v1.{GROUP}"}, "spec": spec})

    async def is_served() -> bool:
        return (await world.ask(VERSION, user="root", headers=MASTERS)).code == 200

    await eventually(is_served)


async def _ends(response: aiohttp.ClientResponse) -> int:
    """Read until the answer breaks off; gives how many ticks came. An answer that ends in order fails the test."""
    count = 0
    try:
        async for _ in response.content:
            count += 1
    except aiohttp.ClientError:
        return count
    raise AssertionError("the answer ended as if it were whole")


async def test_users_arrive_as_kube_apiserver_knows_them(world: World) -> None:
    groups = [f"group-{number}" for number in range(3000)]
    groups += ["a,b", "équipe", " spaced  out".strip(), "group-0"]
    headers = [
        ("Impersonate-Uid", "42"),
        *(("Impersonate-Group", group) for group in groups),
        ("Impersonate-Group", "system:masters"),
        ("Impersonate-Extra-Scopes", "one"),
        ("impersonate-extra-SCOPES", "two, three"),
        ("Impersonate-Extra-Example.com%2fpod-Name", "p"),
        ("Impersonate-Extra-%C3%A9", "é"),
        ("Impersonate-Extra-50%25", "%41"),
    ]

    answer = await world.ask(f"{VERSION}/{THING}/who", user="zoé", headers=headers)

    assert answer.code == 200, answer.body
    assert answer.json == {
        "name": "zoé",
        "uid": "42",
        "groups": [*groups, "system:masters", "system:authenticated"],
        "extra": {
            "scopes": ["one", "two, three"],
            "example.com/pod-name": ["p"],
            "é": ["é"],
            "50%": ["%41"],
        },
    }


async def test_what_a_client_says_of_itself_is_not_believed_behind_kube_apiserver(world: World) -> None:
    await world.allow("carol", "get", "things/who")
    carol = world.plane.authority.issue("carol", groups=["devs"])
    spoofed = [
        ("X-Remote-User", "root"),
        ("X-Remote-Uid", "0"),
        ("X-Remote-Group", "system:masters"),
        ("X-Remote-Extra-Scopes", "all"),
    ]

    async def answered() -> Answer | None:
        answer = await world.kube_apiserver.ask(f"{VERSION}/{THING}/who", headers=spoofed, certificate=carol)
        return answer if answer.code == 200 else None

    answer: Answer = await eventually(answered)

    user = answer.json
    assert (user["name"], user["uid"], user["groups"]) == ("carol", "", ["devs", "system:authenticated"])
    assert "scopes" not in user["extra"]


async def test_a_watch_lasts_where_a_get_is_cut(world: World) -> None:
    await world.allow("alice", "get")
    await world.allow("wendy", "watch")
    watched, got = f"{VERSION}/watch/{THING}/feed", f"{VERSION}/{THING}/feed"

    async def is_allowed() -> bool:
        with suppress(AssertionError):
            async with world.following(got, user="alice"), world.following(watched, user="wendy"):
                return True
        return False

    await eventually(is_allowed)
    async with world.following(watched, user="wendy") as watch, world.following(got, user="alice") as get:
        ticks = await _ends(get)
        assert ticks > 0
        for _ in range(2 * ticks):
            assert await watch.content.readline() == TICKS


async def test_a_watch_is_authorized_as_one(world: World) -> None:
    """By our server too, which is asked as kube-apiserver would."""
    await world.allow("walter", "watch")
    front_proxy = world.plane.front_proxy.issue("front-proxy-client")
    path = f"{VERSION}/{{}}{THING}/feed"

    async def directly(prefix: str, user: str) -> Answer:
        return await world.server.ask(
            path.format(prefix), method="HEAD", headers=[("X-Remote-User", user)], certificate=front_proxy
        )

    for user, prefix, verb in (("walter", "", "get"), ("gerda", "watch/", "watch")):
        through = await world.ask(path.format(prefix), user=user)
        assert (through.code, f'User "{user}" cannot {verb} resource "things/feed"' in through.message) == (403, True)
        assert (await directly(prefix, user)).code == 403


@pytest.mark.parametrize(
    ("method", "prefix", "code"),
    [
        *((method, "watch/", 405) for method in ("POST", "PUT", "PATCH", "DELETE")),
        *((method, "proxy/", 404) for method in ("GET", "POST", "PUT", "PATCH", "DELETE")),
        *((method, "", 405) for method in ("POST", "PUT", "PATCH", "DELETE")),
    ],
)
async def test_a_prefix_makes_no_other_method_pass(world: World, method: str, prefix: str, code: int) -> None:
    answer = await world.ask(f"{VERSION}/{prefix}{THING}/feed", user="root", method=method, headers=MASTERS)

    assert (answer.code, answer.json["kind"]) == (code, "Status")


async def test_a_watch_ends_when_its_right_is_taken_back_and_another_users_goes_on(world: World) -> None:
    binding = await world.allow("mallory", "watch")
    await world.allow("trent", "watch")
    path = f"{VERSION}/watch/{THING}/feed"

    async def is_allowed() -> bool:
        with suppress(AssertionError):
            async with world.following(path, user="mallory"), world.following(path, user="trent"):
                return True
        return False

    await eventually(is_allowed)
    async with world.following(path, user="mallory") as revoked, world.following(path, user="trent") as kept:
        ending = asyncio.create_task(_ends(revoked), name="the watch that ends")
        await world.client.delete(ROLEBINDINGS, binding, namespace="default")
        async with asyncio.timeout(30):
            while not ending.done():
                assert await kept.content.readline() == TICKS
        assert await ending > 0
        for _ in range(20):
            assert await kept.content.readline() == TICKS
    assert (await world.ask(path, user="mallory")).code == 403
    counted = [
        sample
        for family in text_string_to_metric_families(world.metrics.exposition().decode())
        for sample in family.samples
        if sample.name == "apiserver_request_terminations_total" and sample.labels["verb"] == "WATCH"
    ]
    assert [(sample.labels["subresource"], sample.labels["code"], sample.value) for sample in counted] == [
        ("feed", "403", 1)
    ]
