"""The aggregated API server as a program of its own, behind a real kube-apiserver."""

import asyncio
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager

import aiohttp
import pytest
import pytest_asyncio

from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.pki import Authority, Pair
from kube.client import CONFIGMAPS, Json, Resource
from tests.cluster.aggregated import (
    FILES,
    GROUP,
    LARGE,
    MAX_CONNECTIONS,
    PATIENCE,
    SMALL,
    Answer,
    Headers,
    Server,
    World,
    eventually,
    installed,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

OTHER_UID = "00000000-0000-4000-8000-000000000000"
CLUSTERROLEBINDINGS = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
ROLEBINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", namespaced=True)
SERVICEACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount", namespaced=True)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareControlPlane]:
    """One of its own: the signer here would get in the way of the controller's tests."""
    with bare_control_plane(tmp_path_factory.mktemp("apiserver-plane")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(plane: BareControlPlane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with installed(plane, tmp_path_factory.mktemp("apiserver")) as made:
        yield made


async def test_files_of_all_nodes_are_listed_and_nodes_that_did_not_answer_named(world: World) -> None:
    code, out, err = await world.kubectl("get", "--raw", FILES, "--as=alice")

    assert code == 0, err
    listed = json.loads(out)
    assert listed["capture"] == {"namespace": "dev", "name": "web", "uid": world.uid}
    assert [(file["node"], file["name"]) for file in listed["items"]] == [
        ("node-1", LARGE),
        ("node-1", SMALL),
        ("node-2", LARGE),
        ("node-2", SMALL),
    ]
    reasons = {unanswered["node"]: unanswered["message"] for unanswered in listed["unanswered"]}
    assert reasons.keys() == {"node-3", "node-4"}
    assert "did not prove that it is that node's" in reasons["node-3"]
    assert reasons["node-4"] == "node node-4 has no running agent"
    assert "Warning: 2 nodes did not answer, their files are missing: node-3, node-4" in err


async def test_a_listed_url_downloads_the_file(world: World) -> None:
    files = (await world.get(FILES)).json["items"]

    for file in files:
        code, out, err = await world.kubectl("get", "--raw", file["url"], "--as=alice")
        assert code == 0, err
        assert out == world.agents[file["node"]].files[file["name"]]
        assert hashlib.sha256(out).hexdigest() == file["sha256"]


async def test_the_agent_sees_the_apiserver_and_the_uid_of_the_capture(world: World) -> None:
    await world.get(f"{FILES}/node-1/{SMALL}")

    agent = world.agents["node-1"]
    assert agent.peers == {"kubepcap-apiserver"}
    assert world.uid in agent.uids


async def test_the_node_with_another_nodes_certificate_gets_no_request(world: World) -> None:
    answer = await world.get(f"{FILES}/node-3/{SMALL}")

    assert answer.code == 503
    assert "node node-3 did not prove that it is that node's" in answer.message
    assert not world.agents["node-3"].uids


async def test_a_download_says_what_it_is(world: World) -> None:
    content = world.agents["node-2"].files[LARGE]

    answer = await world.get(f"{FILES}/node-2/{LARGE}")

    assert (answer.code, answer.body) == (200, content)
    assert answer.headers["Content-Type"] == "application/vnd.tcpdump.pcap"
    assert answer.headers["Content-Length"] == answer.headers["Kubepcap-Size"] == str(len(content))
    assert answer.headers["Kubepcap-Sha256"] == hashlib.sha256(content).hexdigest()
    assert answer.headers["ETag"] == '"1"'
    assert LARGE in answer.headers["Content-Disposition"]


async def test_a_head_request_gives_the_headers_alone(world: World) -> None:
    answer = await world.get(f"{FILES}/node-2/{LARGE}", method="HEAD")

    assert (answer.code, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == "3000000"


@pytest.mark.parametrize(
    ("query", "headers", "code", "part"),
    [
        ("", [("Range", "bytes=10-19")], 206, slice(10, 20)),
        ("", [("Range", "bytes=2999990-")], 206, slice(2999990, None)),
        ("?offset=100", [], 200, slice(100, None)),
        ("?offset=100&limit=50", [], 200, slice(100, 150)),
        ("?limit=50", [], 200, slice(0, 50)),
        ("", [("If-None-Match", '"1"')], 304, slice(0, 0)),
    ],
)
async def test_a_part_of_a_file_can_be_had(world: World, query: str, headers: Headers, code: int, part: slice) -> None:
    answer = await world.get(f"{FILES}/node-1/{LARGE}{query}", headers=headers)

    assert (answer.code, answer.body) == (code, world.agents["node-1"].files[LARGE][part])


@pytest.mark.parametrize(
    ("path", "headers", "code", "message"),
    [
        (f"{GROUP}/namespaces/dev/packetcaptures/none/files", [], 404, 'packetcaptures.kubepcap.io "none" not found'),
        (f"{FILES}?uid={OTHER_UID}", [], 410, "is another capture now"),
        (f"{FILES}?uid=x", [], 400, "uid must be the UID of the capture"),
        (f"{FILES}/node-1/{SMALL}?uid={OTHER_UID}", [], 410, "is another capture now"),
        (f"{FILES}/node-1/{SMALL.replace('-1.pcap', '-9.pcap')}", [], 404, f"are {LARGE}, {SMALL};"),
        (f"{FILES}/node-9/{SMALL}", [], 404, "files of this capture are on node-1, node-2, node-3, node-4;"),
        (f"{FILES}/node-4/{SMALL}", [], 503, "node node-4 has no running agent at the moment"),
        (f"{FILES}/Node_1/{SMALL}", [], 400, "node: this is no name of a node"),
        (f"{FILES}/node-1/passwd", [], 400, "file: this is no name of a capture file"),
        (f"{FILES}/node-1/{SMALL}?offset=-1", [], 400, "offset must be a number of bytes"),
        (f"{FILES}/node-1/{SMALL}?offset=1", [("Range", "bytes=0-1")], 400, "not both"),
        (f"{FILES}/node-1", [], 404, "could not find the requested resource"),
        (f"{FILES}/node-1/{SMALL}/x", [], 404, "could not find the requested resource"),
    ],
)  # fmt: skip
async def test_a_request_that_cannot_be_met_says_why(
    world: World, path: str, headers: Headers, code: int, message: str
) -> None:
    answer = await world.get(path, headers=headers)

    assert answer.code == code
    assert message in answer.message


async def test_a_part_beyond_the_end_is_refused_with_the_size(world: World) -> None:
    answer = await world.get(f"{FILES}/node-1/{LARGE}", headers=[("Range", "bytes=3000000-")])

    assert (answer.code, answer.headers["Content-Range"]) == (416, "bytes */3000000")
    assert answer.json["kind"] == "Status"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_files_can_only_be_read(world: World, method: str) -> None:
    answer = await world.get(FILES, method=method, user="root")
    assert answer.code in (403, 405)

    answer = await world.get_as_front_proxy(
        FILES, method=method, headers=[("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]
    )
    assert answer.code == 405
    assert "these verbs are: get" in answer.message


@pytest.mark.parametrize(
    ("user", "path", "allowed"),
    [
        ("alice", FILES, True),
        ("alice", f"{FILES}/node-1/{SMALL}", True),
        ("alice", f"{GROUP}/namespaces/prod/packetcaptures/web/files", False),
        ("bob", FILES, True),
        ("bob", f"{GROUP}/namespaces/dev/packetcaptures/other/files", False),
        ("victor", FILES, False),
        ("victor", f"{FILES}/node-1/{SMALL}", False),
        ("nobody", FILES, False),
    ],
)
async def test_native_rbac_decides(world: World, user: str, path: str, allowed: bool) -> None:
    """Asked as kube-apiserver would ask, so that our own review is what refuses."""
    through = await world.get(path, user=user)
    direct = await world.get_as_front_proxy(path, headers=[("X-Remote-User", user)])

    assert (through.code, direct.code) == ((200, 200) if allowed else (403, 403))
    if not allowed:
        assert direct.message == through.message
        assert direct.json["details"] == through.json["details"]


async def test_kubectl_prints_a_refusal_in_the_words_of_kubernetes(world: World) -> None:
    code, _, err = await world.kubectl("get", "--raw", FILES, "--as=victor")

    assert code == 1
    assert (
        'Error from server (Forbidden): packetcaptures.subresources.kubepcap.io "web" is forbidden: User "victor" '
        'cannot get resource "packetcaptures/files" in API group "subresources.kubepcap.io" in the namespace "dev"'
    ) in err


@pytest.mark.parametrize(
    ("user", "name", "namespace", "answer"),
    [
        ("alice", "", "dev", "yes"),
        ("alice", "/web", "dev", "yes"),
        ("alice", "", "prod", "no"),
        ("victor", "", "dev", "no"),
        ("bob", "", "dev", "no"),
        ("bob", "/web", "dev", "yes"),
        ("bob", "/other", "dev", "no"),
    ],
)
async def test_can_i_answers_truly(world: World, user: str, name: str, namespace: str, answer: str) -> None:
    resource = f"packetcaptures.subresources.kubepcap.io{name}"
    _, out, err = await world.kubectl(
        "auth", "can-i", "get", resource, "--subresource=files", f"--namespace={namespace}", f"--as={user}"
    )

    assert out.decode().strip() == answer
    assert "Warning" not in err


async def test_kubectl_still_means_the_captures_themselves(world: World) -> None:
    code, out, err = await world.kubectl("get", "packetcaptures", "--namespace=dev", "--output=name")

    assert code == 0, err
    assert out.split() == [b"packetcapture.kubepcap.io/other", b"packetcapture.kubepcap.io/web"]


async def test_kubectl_explains_the_captures_themselves(world: World) -> None:
    code, out, err = await world.kubectl("explain", "packetcaptures.spec.filters")

    assert code == 0, err
    assert out.split()[:2] == [b"GROUP:", b"kubepcap.io"]
    assert b"  protocol\t" in out


async def test_openapi_is_merged_into_that_of_kube_apiserver(world: World) -> None:
    path = f"{GROUP}/namespaces/{{namespace}}/packetcaptures/{{name}}/files"

    async def in_version_3() -> bool:
        index = (await world.get("/openapi/v3", user="system:admin", headers=_MASTERS)).json["paths"]
        if "apis/subresources.kubepcap.io/v1" not in index:
            return False
        document = await world.get(
            index["apis/subresources.kubepcap.io/v1"]["serverRelativeURL"], user="system:admin", headers=_MASTERS
        )
        return set(document.json["paths"]) == {path, f"{path}/{{node}}/{{file}}"}

    async def in_version_2() -> bool:
        document = (await world.get("/openapi/v2", user="system:admin", headers=_MASTERS)).json
        return path in document["paths"] and (
            "io.kubepcap.subresources.v1.PacketCaptureFileList" in document["definitions"]
        )

    await eventually(in_version_3)
    await eventually(in_version_2)


async def test_kube_apiserver_logs_no_error_for_the_group(world: World) -> None:
    lines = (world.plane.directory / "kube-apiserver.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("E") and "subresources.kubepcap.io" in line] == []


_GROUPS = [("X-Remote-Group", f"group-{number}") for number in range(3000)]
_MASTERS = [("Impersonate-Group", "system:masters")]


@pytest.mark.parametrize(
    ("common_name", "headers", "code"),
    [
        pytest.param(None, [], 401, id="nobody"),
        pytest.param(None, [("X-Remote-User", "alice")], 401, id="no certificate"),
        pytest.param("someone-else", [("X-Remote-User", "alice")], 401, id="a name that is not allowed"),
        pytest.param("front-proxy-client", [], 401, id="no user"),
        pytest.param("front-proxy-client", [("X-Remote-User", "alice")], 200, id="front proxy"),
        pytest.param("front-proxy-client", [("X-Remote-User", "eve")], 403, id="no right"),
        pytest.param(
            "front-proxy-client",
            [("X-Remote-User", "eve"), ("Impersonate-User", "alice"), ("Impersonate-Group", "system:masters")],
            403,
            id="impersonation means nothing here",
        ),
        pytest.param(
            "front-proxy-client",
            [("X-Remote-User", "eve"), *_GROUPS, ("X-Remote-Group", "system:masters")],
            200,
            id="thousands of groups",
        ),
        pytest.param("front-proxy-client", [("X-Remote-User", "zoé")], 403, id="UTF-8"),
        pytest.param(None, [("Authorization", "Bearer nonsense")], 401, id="a token that is not valid"),
        pytest.param(None, [("Authorization", "Basic YWxpY2U6eA==")], 401, id="a scheme that is not spoken"),
    ],
)  # fmt: skip
async def test_only_the_front_proxy_may_name_a_user(
    world: World, common_name: str | None, headers: Headers, code: int
) -> None:
    certificate = world.plane.front_proxy.issue(common_name) if common_name else None

    answer = await world.apiserver.ask(FILES, headers=headers, certificate=certificate)

    assert answer.code == code, answer.body
    if code == 403:
        assert dict(headers)["X-Remote-User"] in answer.message


async def test_a_certificate_of_another_ca_gets_no_connection(world: World) -> None:
    imposter = Authority.create("front-proxy").issue("front-proxy-client")

    with pytest.raises((ssl.SSLError, ConnectionError)):
        await world.apiserver.ask(FILES, headers=[("X-Remote-User", "alice")], certificate=imposter)


async def test_trust_in_front_proxies_follows_the_configmap(world: World) -> None:
    """kube-apiserver keeps the CAs that it finds in the ConfigMap beside its own."""
    second = Authority.create("second-front-proxy")
    key = "requestheader-client-ca-file"
    name, namespace = "extension-apiserver-authentication", "kube-system"
    published = (await world.client.get(CONFIGMAPS, name, namespace=namespace))["data"][key]

    async def publish(authorities: str) -> None:
        await world.client.patch(CONFIGMAPS, name, {"data": {key: authorities}}, namespace=namespace)

    tls = world.apiserver.tls(second.issue("front-proxy-client"))
    async with aiohttp.ClientSession(headers={"X-Remote-User": "alice"}) as session:

        async def ask() -> int:
            url = f"https://{world.apiserver.address}:{world.apiserver.port}{FILES}"
            try:
                async with session.get(url, ssl=tls, server_hostname=world.apiserver.name) as response:
                    await response.read()
                    return response.status
            except aiohttp.ClientError:
                return 0

        async def is_trusted() -> bool:
            return await ask() == 200

        async def is_refused_on_the_same_connection() -> bool:
            return await ask() == 401

        assert await ask() == 0
        await publish(published + second.certificate.decode())
        await eventually(is_trusted)
        await publish(published)
        await eventually(is_refused_on_the_same_connection)

    answer = await world.get_as_front_proxy(FILES, headers=[("X-Remote-User", "alice")])
    assert answer.code == 200


async def test_a_bearer_token_names_its_user(world: World) -> None:
    _, token, _ = await world.kubectl("create", "token", "kubepcap-agent", "--namespace=kubepcap")
    headers = [("Authorization", f"Bearer {token.decode().strip()}"), ("X-Remote-User", "alice")]

    answer = await world.apiserver.ask(FILES, headers=headers)

    assert answer.code == 403
    assert 'User "system:serviceaccount:kubepcap:kubepcap-agent" cannot get' in answer.message
    assert (await world.apiserver.ask("/apis", headers=headers)).code == 200


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
async def test_health_is_for_everyone(world: World, path: str) -> None:
    answer = await world.apiserver.ask(path)

    assert (answer.code, answer.body) == (200, b"ok")


@pytest.mark.parametrize(
    "tail",
    [
        "files/../../other/files",
        "files/node-1/../../../other/files",
        "./files",
        "files//node-1",
        "files/%2e%2e/%2e%2e/other/files",
        "files/..%2f..%2fother%2ffiles",
        "files/node-1/..%5c..%5cother",
    ],
)
async def test_a_path_of_two_meanings_is_refused_to_everyone(world: World, tail: str) -> None:
    path = f"{GROUP}/namespaces/dev/packetcaptures/web/{tail}"
    root = [("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]

    direct = await world.get_as_front_proxy(path, headers=root)
    through = await world.get(path, user="bob")

    assert direct.code == 400
    assert through.code in (301, 400, 403, 404)
    assert b'"items"' not in through.body


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", f"{GROUP}/proxy/namespaces/dev/packetcaptures/web/files", 404),
        ("GET", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", 405),
        ("POST", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", 405),
        ("DELETE", f"{GROUP}/watch/namespaces/dev/packetcaptures/web/files", 405),
        ("GET", f"{GROUP}/namespaces/dev/packetcaptures", 404),
        ("GET", f"{GROUP}/packetcaptures/web/files", 404),
        ("GET", "/debug/pprof", 404),
        ("POST", "/apis", 405),
    ],
)
async def test_what_is_not_served_is_refused_even_to_the_mightiest(
    world: World, method: str, path: str, code: int
) -> None:
    root = [("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]

    answer = await world.get_as_front_proxy(path, method=method, headers=root)

    assert (answer.code, answer.json["kind"]) == (code, "Status")


async def test_the_audit_id_is_that_of_kube_apiserver(world: World) -> None:
    answer = await world.get_as_front_proxy(FILES, headers=[("X-Remote-User", "alice"), ("Audit-ID", "b1946ac9-2")])

    async def logged() -> list[Json]:
        """Written once the answer was sent, and so maybe after it came."""
        return [json.loads(line) for line in world.log.read_text().splitlines() if "b1946ac9-2" in line]

    assert answer.headers["Audit-ID"] == "b1946ac9-2"
    lines = await eventually(logged)
    assert [(line["user"], line["verb"], line["code"]) for line in lines] == [("alice", "get", 200)]


async def test_a_download_is_logged_with_its_object_and_its_bytes(world: World) -> None:
    await world.get_as_front_proxy(
        f"{FILES}/node-1/{LARGE}", headers=[("X-Remote-User", "alice"), ("Audit-ID", "d-1"), ("Range", "bytes=0-99")]
    )

    async def line() -> Json | None:
        lines = [json.loads(text) for text in world.log.read_text().splitlines() if '"d-1"' in text]
        return lines[0] if lines else None

    logged = await eventually(line)
    assert (logged["user"], logged["verb"], logged["code"], logged["bytes"]) == ("alice", "get", 206, 100)
    assert logged["object"] == {
        "group": "subresources.kubepcap.io",
        "resource": "packetcaptures",
        "subresource": "files",
        "namespace": "dev",
        "name": "web",
    }
    assert (logged["remote"], logged["cut"]) == ("127.0.0.1", None)


async def test_metrics_are_shown_to_those_who_may_read_them_and_on_the_port_for_health(world: World) -> None:
    root = [("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")]
    await world.get_as_front_proxy(FILES, headers=[("X-Remote-User", "alice")])

    refused = await world.get_as_front_proxy("/metrics", headers=[("X-Remote-User", "alice")])
    shown = await world.get_as_front_proxy("/metrics", headers=root)
    url = f"http://127.0.0.1:{world.health_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        unasked = await response.text()

    assert (refused.code, shown.code, response.status) == (403, 200, 200)
    assert 'User "alice" cannot get path "/metrics"' in refused.message
    for text in (shown.body.decode(), unasked):
        assert 'subresource="files",verb="GET",version="v1"' in text
        assert "alice" not in text


async def test_silent_connections_do_not_keep_kube_apiserver_out(world: World) -> None:
    with ExitStack() as stack:
        for _ in range(2 * MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection((world.apiserver.address, world.apiserver.port)))
        answers = await asyncio.gather(*(world.get(FILES) for _ in range(10)))
        assert [answer.code for answer in answers] == [200] * 10
        assert await world.is_ready()


async def test_a_download_that_the_agent_breaks_off_is_seen_to_be_broken(world: World) -> None:
    agent = world.agents["node-1"]
    agent.pause_at, agent.dies = 1_000_000, True
    agent.go_on.set()
    try:
        code, out, err = await world.kubectl("get", "--raw", f"{FILES}/node-1/{LARGE}", "--as=alice")
        with pytest.raises((http.client.IncompleteRead, ConnectionError, ssl.SSLError)):
            await world.get_as_front_proxy(f"{FILES}/node-1/{LARGE}", headers=[("X-Remote-User", "alice")])
    finally:
        agent.pause_at, agent.dies = None, False
        agent.go_on.clear()

    assert code != 0, (len(out), err)


async def test_a_client_that_goes_away_ends_the_agents_work(world: World) -> None:
    agent = world.agents["node-1"]
    agent.files[LARGE] = os.urandom(50_000_000)
    try:
        async with world.download() as response:
            await response.content.readexactly(100_000)

        async def is_cut_off() -> bool:
            return agent.cut_off > 0

        await eventually(is_cut_off)
    finally:
        agent.files[LARGE] = os.urandom(3_000_000)


async def test_a_user_has_only_so_many_downloads_at_a_time(world: World) -> None:
    agent = world.agents["node-1"]
    agent.pause_at = 1000
    try:
        async with world.download(), world.download():
            refused = await world.get_as_front_proxy(f"{FILES}/node-1/{LARGE}", headers=[("X-Remote-User", "alice")])
            other = await world.get_as_front_proxy(f"{FILES}/node-2/{LARGE}", headers=[("X-Remote-User", "bob")])
            agent.go_on.set()
    finally:
        agent.pause_at = None
        agent.go_on.clear()

    assert (refused.code, refused.headers["Retry-After"]) == (429, "1")
    assert 'user "alice" has 2 downloads under way' in refused.message
    assert other.code == 200


async def test_no_answer_is_given_while_authorization_does_not_work(world: World) -> None:
    name = "kubepcap:apiserver:auth-delegator"
    binding = await world.client.get(CLUSTERROLEBINDINGS, name)
    await world.client.delete(CLUSTERROLEBINDINGS, name)
    try:
        users = iter(range(1000))  # a new one each time, since answers are kept

        async def refused() -> Answer | None:
            headers = [("X-Remote-User", f"user-{next(users)}"), ("X-Remote-Group", "system:masters")]
            answer = await world.get_as_front_proxy(FILES, headers=headers)
            return answer if answer.code == 500 else None

        answer = await eventually(refused)
        assert answer.message.startswith("Internal error occurred: a SubjectAccessReview failed")
        ready = await world.apiserver.ask("/readyz")
        assert (ready.code, ready.body) == (503, b"[-]authorization failed: reason withheld\n")
    finally:
        del binding["metadata"]["resourceVersion"], binding["metadata"]["uid"]
        await world.client.create(CLUSTERROLEBINDINGS, binding)

    await eventually(world.is_ready)


@asynccontextmanager
async def reading(
    server: Server, path: str, headers: Mapping[str, str], certificate: Pair | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer on its way, at the pace of whoever reads it."""
    url = f"https://{server.address}:{server.port}{path}"
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(url, ssl=server.tls(certificate), server_hostname=server.name) as response,
    ):
        assert response.status == 200, await response.read()
        yield response


async def may_read(world: World, **authorization: str) -> None:
    """Wait until a RoleBinding counts."""

    async def is_allowed() -> bool:
        return (await world.apiserver.ask(FILES, headers=authorization.items())).code == 200

    await eventually(is_allowed)


async def service_account_token(world: World, name: str) -> str:
    """That of a new ServiceAccount in the namespace `dev`, which may read files there."""
    await bound(world, name, f"--serviceaccount=dev:{name}")
    for arguments in (("create", "serviceaccount", name), ("create", "token", name)):
        code, out, err = await world.kubectl("-n", "dev", *arguments)
        assert code == 0, err
    token = out.decode().strip()
    await may_read(world, Authorization=f"Bearer {token}")
    return token


async def bound(world: World, name: str, subject: str) -> None:
    command = ("create", "rolebinding", name, "--clusterrole=kubepcap-files-reader", subject)
    code, _, err = await world.kubectl("-n", "dev", *command)
    assert code == 0, err


async def test_a_download_ends_when_its_right_is_taken_back_and_another_users_goes_on(world: World) -> None:
    """Two end: one of a ServiceAccount's own, which stands still, and one that a client reads slowly."""
    slow, still = world.agents["node-1"], world.agents["node-2"]
    slow.files[LARGE] = os.urandom(50_000_000)
    still.pause_at = 1000
    await bound(world, "sam", "--user=sam")
    token = await service_account_token(world, "reader")
    bearer, sam = {"Authorization": f"Bearer {token}"}, {"Impersonate-User": "sam"}
    try:
        async with (
            reading(world.apiserver, f"{FILES}/node-2/{LARGE}", bearer) as standing,
            reading(world.kube_apiserver, f"{FILES}/node-1/{LARGE}", sam, world.admin) as slowly,
            world.download("node-2") as kept,
        ):
            for name in ("reader", "sam"):
                await world.client.delete(ROLEBINDINGS, name, namespace="dev")

            async def is_told() -> bool:
                await slowly.content.readexactly(10_000)
                log = await asyncio.to_thread(world.log.read_text)
                return all(
                    f"'{user}' is no longer let get" in log for user in ("system:serviceaccount:dev:reader", "sam")
                )

            await eventually(is_told)
            for ended in (standing, slowly):
                with pytest.raises(aiohttp.ClientError):
                    await ended.content.read()
            still.go_on.set()
            assert len(await kept.content.read()) == len(still.files[LARGE])
    finally:
        slow.files[LARGE] = os.urandom(3_000_000)
        still.pause_at = None
        still.go_on.set()
        still.go_on.clear()


async def test_a_download_ends_when_its_token_is_no_longer_valid(world: World) -> None:
    agent = world.agents["node-2"]
    agent.pause_at = 1000
    token = await service_account_token(world, "passing")
    try:
        async with reading(
            world.apiserver, f"{FILES}/node-2/{LARGE}", {"Authorization": f"Bearer {token}"}
        ) as response:
            await world.client.delete(SERVICEACCOUNTS, "passing", namespace="dev")
            async with asyncio.timeout(2 * PATIENCE):  # kube-apiserver believes a token for ten seconds itself
                with pytest.raises(aiohttp.ClientError):
                    await response.content.read()
    finally:
        agent.pause_at = None
        agent.go_on.set()
        agent.go_on.clear()
    log = await asyncio.to_thread(world.log.read_text)
    assert "'system:serviceaccount:dev:passing' is no longer let get" in log


@pytest.mark.parametrize(
    ("key", "value"),
    [("requestheader-client-ca-file", "garbage"), ("requestheader-allowed-names", "{"), (None, None)],
)
async def test_what_was_last_known_of_front_proxies_stays_in_force(
    world: World, key: str | None, value: str | None
) -> None:
    """With None the whole ConfigMap is deleted, which kube-apiserver makes anew."""
    name, namespace = "extension-apiserver-authentication", "kube-system"
    published = await world.client.get(CONFIGMAPS, name, namespace=namespace)
    lines = len(world.log.read_text().splitlines())

    async def is_noticed() -> bool:
        log = await asyncio.to_thread(world.log.read_text)
        return any("what it said last stays in force" in line for line in log.splitlines()[lines:])

    if key is None:
        await world.client.delete(CONFIGMAPS, name, namespace=namespace)
    else:
        await world.client.patch(CONFIGMAPS, name, {"data": {key: value}}, namespace=namespace)
    try:
        await eventually(is_noticed)
        answer = await world.get_as_front_proxy(FILES, headers=[("X-Remote-User", "alice")])
        refused = await world.apiserver.ask(FILES, headers=[("X-Remote-User", "alice")])
        ready = await world.apiserver.ask("/readyz")
    finally:
        if key is not None:
            await world.client.patch(CONFIGMAPS, name, {"data": {key: published["data"][key]}}, namespace=namespace)

    assert (answer.code, refused.code, ready.code) == (200, 401, 200)


async def test_a_token_that_can_not_be_checked_is_no_token(world: World) -> None:
    token = await service_account_token(world, "unchecked")
    name = "kubepcap:apiserver:auth-delegator"
    binding = await world.client.get(CLUSTERROLEBINDINGS, name)
    await world.client.delete(CLUSTERROLEBINDINGS, name)
    try:

        async def is_refused() -> bool:
            """With another token each time: answers are kept."""
            code, out, err = await world.kubectl("-n", "dev", "create", "token", "unchecked")
            assert code == 0, err
            headers = [("Authorization", f"Bearer {out.decode().strip()}")]
            return (await world.apiserver.ask(FILES, headers=headers)).code == 401

        await eventually(is_refused)
    finally:
        del binding["metadata"]["resourceVersion"], binding["metadata"]["uid"]
        await world.client.create(CLUSTERROLEBINDINGS, binding)
    await eventually(world.is_ready)

    await may_read(world, Authorization=f"Bearer {token}")


async def test_sigterm_lets_a_download_end_and_takes_no_new_one(world: World) -> None:
    """The last test: the program is gone after it."""
    agent = world.agents["node-2"]
    agent.pause_at = 1_000_000
    async with world.download("node-2") as response:
        start = await response.content.readexactly(1_000_000)
        world.process.send_signal(signal.SIGTERM)

        async def is_not_ready() -> bool:
            return (await world.apiserver.ask("/readyz")).code == 503

        await eventually(is_not_ready)
        during = await world.get_as_front_proxy(f"{FILES}/node-1/{SMALL}", headers=[("X-Remote-User", "bob")])
        agent.go_on.set()
        rest = await response.content.read()

    assert (during.code, during.headers["Connection"]) == (200, "close")
    assert start + rest == agent.files[LARGE]
    async with asyncio.timeout(PATIENCE):
        assert await world.process.wait() == 0
