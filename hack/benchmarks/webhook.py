"""`hack/bench webhook`: 500 reviews a second, and what admission adds to a create."""

import argparse
import base64
import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import yaml

from api.capturepolicy import CapturePolicy
from api.packetcapture import PacketCapture
from api.stamp import ANNOTATION
from hack.benchmarks import process
from hack.benchmarks.admission import PATH
from hack.benchmarks.api import percentile
from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Goal, Outcome, Spread
from hack.benchmarks.reviewer import Reviewed, Reviews
from hack.clusters.api import Api
from hack.clusters.bare import BareControlPlane, bare_control_plane
from hack.clusters.binaries import HACK
from hack.clusters.failure import Failure
from hack.clusters.pki import Authority
from kube.client import Json
from webhook.review import User
from webhook.stamp import issue

SUMMARY: Final = "p50 and p99 of 500 reviews a second, and what admission adds to a create"
METHOD: Final = (
    "The webhook in a process of its own, with the rights that its manifest gives it, asking a real kube-apiserver for "
    "the rights of {users} users on {policies} policies; the sender in another. Reviews are sent when they are due, "
    "stamp and judge in turn, and their time counts from then. All of it shares this machine's cores.\n"
    "Creates are dry runs through kube-apiserver over one connection, one in a namespace whose captures the webhooks "
    "see, one in a namespace whose they don't, in turn."
)

_MANIFESTS: Final = HACK.parent / "manifests"
_SERVICE_ACCOUNT: Final = "system:serviceaccount:kubepcap:kubepcap-webhook"
_RBAC: Final = "rbac.authorization.k8s.io"
_POLICIES: Final = 5
_USERS: Final = 50
_CAPTURES: Final = 20
_WARMING: Final = 5.0
_PATIENCE: Final = 60.0
_LONGEST_P99: Final = 0.5
_MOST_GROWTH: Final = 10_000_000
_JUDGED: Final = "judged"
_FREE: Final = "free"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=500, help="reviews a second (default: 500)")
    parser.add_argument("--seconds", type=float, default=30, help="for so long (default: 30)")
    parser.add_argument("--creates", type=int, default=300, help="of each kind (default: 300)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure. Raises Failure."""
    outcome = Outcome("hack/bench webhook", Machine.describe(), METHOD.format(users=_USERS, policies=_POLICIES))
    with tempfile.TemporaryDirectory(prefix="kubepcap-bench-") as place:
        directory = Path(place)
        with bare_control_plane(directory) as plane:
            authority = Authority.create("bench-webhook")
            authority.issue("webhook", hosts=["127.0.0.1"]).write(directory, "webhook")
            _apply(plane, *_manifests())
            _apply(plane, *_objects())
            with _webhook(plane, directory) as (pid, port):
                measure_reviews(pid, port, authority, outcome, arguments)
                _apply(plane, *_configurations(port, authority))
                measure_creates(plane, outcome, count=arguments.creates)
    return outcome


def measure_reviews(pid: int, port: int, authority: Authority, outcome: Outcome, arguments: argparse.Namespace) -> None:
    """Add the row of the reviews, and their goals."""

    def reviews(seconds: float) -> Reviewed:
        return _reviewed(
            Reviews(
                url=f"https://127.0.0.1:{port}",
                ca=authority.certificate.decode(),
                rate=arguments.rate,
                seconds=seconds,
                bodies=list(bodies()),
            )
        )

    reviews(_WARMING)
    memory, cpu = process.rss(pid), process.cpu_seconds(pid)
    made = reviews(arguments.seconds)
    cpu, grown = process.cpu_seconds(pid) - cpu, process.rss(pid) - memory
    p50, p99 = percentile(made.times, 50), percentile(made.times, 99)
    outcome.rows.append(
        _row("reviews, directly", p50=p50, p99=p99, count=len(made.times), cpu=cpu, memory=process.rss(pid))
    )
    others = {verdict: count for verdict, count in made.verdicts.items() if verdict != "allowed"}
    outcome.goals += [
        Goal(
            f"{arguments.rate:g} reviews a second are all answered, and as they should be",
            f"{made.verdicts.get('allowed', 0):,} of {len(made.times):,}" + (f", others {others}" if others else ""),
            not others,
        ),
        Goal(
            "p99 under 500 ms, a tenth of the time that kube-apiserver waits",
            f"{1000 * p99:.0f} ms (longest {1000 * max(made.times):.0f} ms)",
            p99 < _LONGEST_P99,
        ),
        Goal(
            f"memory grows by less than 10 MB in {arguments.seconds:g} s",
            f"{grown / 1e6:.1f} MB, from {memory / 1e6:.1f} MB",
            grown < _MOST_GROWTH,
        ),
    ]


def measure_creates(plane: BareControlPlane, outcome: Outcome, *, count: int) -> None:
    """Add the rows of creates with and without the webhooks. What admission adds is said, not promised."""
    api = Api(plane.kubeconfig)
    times: dict[str, list[float]] = {_JUDGED: [], _FREE: []}
    connection = http.client.HTTPSConnection(
        api.address.hostname or "", api.address.port, timeout=_PATIENCE, context=api.tls
    )
    with closing(connection):
        _until_judged(connection)
        for number in range(count):
            for namespace in (_JUDGED, _FREE):
                began = time.perf_counter()
                code, said = _create(connection, namespace, _capture(number % _CAPTURES))
                times[namespace].append(time.perf_counter() - began)
                if code != http.HTTPStatus.CREATED:
                    raise Failure(f"a create was answered {code}: {said}")
    for name, namespace in (("creates with the webhooks", _JUDGED), ("creates without", _FREE)):
        p50, p99 = percentile(times[namespace], 50), percentile(times[namespace], 99)
        outcome.rows.append(_row(name, p50=p50, p99=p99, count=count))
    ratio = percentile(times[_JUDGED], 50) / percentile(times[_FREE], 50)
    outcome.rows.append(_row(f"with : without = {ratio:.2f} at the median"))


def _row(
    name: str,
    *,
    p50: float | None = None,
    p99: float | None = None,
    count: int | None = None,
    cpu: float | None = None,
    memory: int | None = None,
) -> dict[str, Spread | str | float | None]:
    return {
        "what": name,
        "p50 ms": None if p50 is None else round(1000 * p50, 2),
        "p99 ms": None if p99 is None else round(1000 * p99, 2),
        "count": count,
        "CPU ms each": None if cpu is None or not count else round(1000 * cpu / count, 2),
        "RSS MB": None if memory is None else round(memory / 1e6, 1),
    }


def _reviewed(reviews: Reviews) -> Reviewed:
    """What a sender in a process of its own measured. Raises Failure."""
    done = subprocess.run(
        [sys.executable, "-m", "hack.benchmarks.reviewer"],
        input=reviews.to_json(), capture_output=True, text=True, cwd=HACK.parent, check=False,
        timeout=reviews.seconds + _PATIENCE,
    )  # fmt: skip
    if done.returncode:
        raise Failure(f"reviews could not be sent: {done.stderr}")
    return Reviewed(**json.loads(done.stdout))


@contextmanager
def _webhook(plane: BareControlPlane, directory: Path) -> Iterator[tuple[int, int]]:
    """The webhook's process and port."""
    kubeconfig = plane.kubeconfig_for(_SERVICE_ACCOUNT, "system:serviceaccounts", "system:authenticated")
    command = ["setpriv", "--pdeathsig=KILL", "--", sys.executable, "-m", "hack.benchmarks.admission", str(directory)]
    log = directory / "webhook.log"
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, cwd=HACK.parent, env=os.environ | {"KUBECONFIG": str(kubeconfig)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out,
        )  # fmt: skip
    try:
        assert started.stdout is not None
        readable, _, _ = select.select([started.stdout], [], [], _PATIENCE)
        port = started.stdout.readline().decode().strip() if readable else ""
        if not port.isdigit():
            raise Failure("the webhook did not come up", log=log)
        yield started.pid, int(port)
    finally:
        started.kill()
        started.wait()


def _capture(number: int, *, user: int = 0) -> Json:
    spec = {"selector": f'app == "web" && user != "{user}"', "filters": [{"protocol": "TCP", "ports": [8000 + number]}]}
    return {
        "apiVersion": "kubepcap.io/v1",
        "kind": "PacketCapture",
        "metadata": {"name": f"c{number}-of-{user}", "namespace": _JUDGED},
        "spec": spec | {"endTime": "2020-01-01T00:00:00Z"},
    }


def _policies() -> list[Json]:
    """All of them may be used by everyone, and the last by name allows what the others refuse."""
    return [
        {
            "apiVersion": "kubepcap.io/v1",
            "kind": "CapturePolicy",
            "metadata": {"name": f"p{number}"},
            "spec": {"filters": {"deniedPorts": [22] if number == _POLICIES - 1 else ["8000:8999"]}},
        }
        for number in range(_POLICIES)
    ]


def bodies() -> Iterator[tuple[str, str]]:
    """Each capture of each user is stamped and judged."""
    policy = CapturePolicy.model_validate(_policies()[-1])
    for user in range(_USERS):
        info = {"username": f"user-{user}", "groups": ["benchmark", "system:authenticated"]}
        for number in range(_CAPTURES):
            item = _capture(number, user=user)
            yield f"/stamp/{PATH}", _review(item, info)
            stamp = issue(PacketCapture.model_validate(item), policy, user=User.model_validate(info))
            item["metadata"]["annotations"] = {ANNOTATION: stamp.to_annotation()}
            yield f"/judge/{PATH}", _review(item, info)


def _review(item: Json, user: Json) -> str:
    request = {
        "uid": f"{user['username']}-{item['metadata']['name']}",
        "resource": {"group": "kubepcap.io", "version": "v1", "resource": "packetcaptures"},
        "name": item["metadata"]["name"],
        "namespace": _JUDGED,
        "operation": "CREATE",
        "userInfo": user,
        "object": item,
    }
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})


def _manifests() -> list[Json]:
    """The kinds, the webhook's own rights, and those of who may use every policy."""
    crds = [yaml.safe_load(file.read_text()) for file in sorted((_MANIFESTS / "crds").glob("*.yaml"))]
    shipped = yaml.safe_load_all((_MANIFESTS / "webhook.yaml").read_text())
    rights = [item for item in shipped if item["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    role = {"apiGroup": _RBAC, "kind": "ClusterRole", "name": "benchmark"}
    rules = [
        {"apiGroups": ["kubepcap.io"], "resources": ["capturepolicies"], "verbs": ["use"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
    ]
    group = {"apiGroup": _RBAC, "kind": "Group", "name": "benchmark"}
    meta = {"apiVersion": f"{_RBAC}/v1", "metadata": {"name": "benchmark"}}
    return [
        *crds,
        *rights,
        meta | {"kind": "ClusterRole", "rules": rules},
        meta | {"kind": "ClusterRoleBinding", "roleRef": role, "subjects": [group]},
    ]


def _objects() -> list[Json]:
    namespaces = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"is": name}}}
        for name in (_JUDGED, _FREE)
    ]
    return [*namespaces, *_policies()]


def _configurations(port: int, authority: Authority) -> Iterator[Json]:
    """The shipped ones, but for the address, and for one namespace alone."""
    for shipped in yaml.safe_load_all((_MANIFESTS / "webhookconfigurations.yaml").read_text()):
        (webhook,) = shipped["webhooks"]
        webhook["clientConfig"] = {
            "url": f"https://127.0.0.1:{port}/{webhook['name'].partition('.')[0]}/{PATH}",
            "caBundle": base64.b64encode(authority.certificate).decode(),
        }
        webhook["namespaceSelector"] = {"matchLabels": {"is": _JUDGED}}
        yield shipped


def _apply(plane: BareControlPlane, *items: Json) -> None:
    """Raises Failure."""
    command = [str(plane.kubectl), f"--kubeconfig={plane.kubeconfig}", "apply", "--validate=false", "--filename=-"]
    given = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    deadline = time.monotonic() + _PATIENCE
    while (done := subprocess.run(command, input=given, capture_output=True, text=True, check=False)).returncode:
        if time.monotonic() > deadline:  # a kind that was defined a moment ago is served by and by
            raise Failure(f"kubectl apply: {done.stderr}")
        time.sleep(0.5)


def _create(connection: http.client.HTTPSConnection, namespace: str, item: Json) -> tuple[int, str]:
    item["metadata"]["namespace"] = namespace
    path = f"/apis/kubepcap.io/v1/namespaces/{namespace}/packetcaptures?dryRun=All"
    connection.request("POST", path, body=json.dumps(item), headers={"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def _until_judged(connection: http.client.HTTPSConnection) -> None:
    """kube-apiserver learns of webhook configurations by and by. Raises Failure."""
    deadline = time.monotonic() + _PATIENCE
    while ANNOTATION not in (said := _create(connection, _JUDGED, _capture(0))[1]):
        if time.monotonic() > deadline:
            raise Failure(f"the webhook is not asked: {said}")
        time.sleep(0.1)
