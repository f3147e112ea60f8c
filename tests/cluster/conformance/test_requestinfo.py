"""Our reading of a request beside Kubernetes' own: `hack/conformance/requestinfo` runs the code of `k8s.io/apiserver`.

What ours refuses is not compared: a path that could be read in two ways is nobody's. What it reads must be the same in
every field, since kube-apiserver has authorized the request by its own reading.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from apiserver.aggregation.requestinfo import MethodError, PathError, parse
from hack.clusters.binaries import find
from tests.apiserver.aggregation.test_requestinfo import NON_RESOURCES, RESOURCES, SELECTORS, G

Reading = dict[str, Any]

TABLE = [
    *((method, target) for method, target, *_ in RESOURCES),
    *NON_RESOURCES,
    *(("GET", f"/apis/group/version/resource?{query}") for query, *_ in SELECTORS),
    *(("DELETE", f"/apis/group/version/resource?{query}") for query, *_ in SELECTORS),
    *(("GET", f"/apis/group/version/watch/resource?{query}") for query, *_ in SELECTORS),
]


class Kubernetes:
    """The program that reads requests as Kubernetes does, a line each."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def read(self, method: str, target: str) -> Reading:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{method} {target}\n".encode())
        self._process.stdin.flush()
        reading: Reading = json.loads(self._process.stdout.readline())
        return reading


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[Kubernetes]:
    with subprocess.Popen(
        [find("requestinfo")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        yield Kubernetes(process)
        assert process.stdin is not None
        process.stdin.close()


def ours(method: str, target: str) -> Reading:
    """Our reading in the words of Kubernetes' JSON."""
    info = asdict(parse(method, target))
    del info["query"]
    reading = {"".join(word.title() for word in name.split("_")): value for name, value in info.items()}
    return {
        **{name.replace("Api", "API"): value for name, value in reading.items()},
        "Parts": list(info["parts"]) or None,
        "Error": "",
    }


@pytest.mark.parametrize(("method", "target"), TABLE, ids=[" ".join(line) for line in TABLE])
def test_the_table_is_read_as_kubernetes_reads_it(kubernetes: Kubernetes, method: str, target: str) -> None:
    assert ours(method, target) == kubernetes.read(method, target)


def test_what_we_refuse_kubernetes_authorizes_under_the_name_before_it(kubernetes: Kubernetes) -> None:
    """What the refusal is for."""
    traversing = kubernetes.read("GET", "/apis/g/v1/namespaces/dev/packetcaptures/c1/files/../../other/files")

    assert (traversing["Name"], traversing["Subresource"]) == ("c1", "files")
    assert traversing["Parts"][3:] == ["..", "..", "other", "files"]


_WORDS = ("api", "apis", "v1", "g", "watch", "proxy", "namespaces", "status", "finalize", "dev", "pods", "web", "files")
_ODD = ("", ".", "..", "%2e", "a%2Fb", "é", "a;b", "*", "~", "@", "a:b", "a=b,c")
_SEGMENTS = st.sampled_from([*_WORDS, *_WORDS, *_WORDS, *_WORDS, *_ODD])
_PREFIXES = st.sampled_from(["/api/v1", "/apis/g/v1", "/apis", "/api", "", G])
_METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "BREW"])
_FIELDS = st.lists(
    st.tuples(
        st.sampled_from(["metadata.name", "metadata.namespace", "a", "a!b", ""]),
        st.sampled_from(["=", "==", "!=", "", "!==", "==="]),
        st.sampled_from(["web", "", "..", "a/b", "a%b", r"a\,b", r"a\=b", r"a\\", r"a\b", "a=b", "é", "\\"]),
    ).map("".join),
    max_size=3,
).map(",".join)
_LABELS = st.lists(
    st.one_of(
        st.sampled_from(["a=b", "a==b", "a!=b", "!a", "a", "x.io/a=b", "a in (b,c)", "a notin (b)", "a="]),
        st.sampled_from(["in in (in)", "-a", "a=-", "a b", "(", "", "a>1", "a in ()", "a" * 63, "a" * 64, " a = b "]),
        st.sampled_from([f"{'a' * 253}/b", f"{'a' * 254}/b", "a..b/c", "A/b", "a/b/c"]),
    ),
    max_size=2,
).map(",".join)
_PARAMETERS = st.one_of(
    st.tuples(st.just("watch"), st.sampled_from(["true", "false", "FALSE", "0", "1", "", "falſe", "no"])),
    st.tuples(st.just("fieldSelector"), st.one_of(st.just("metadata.name=web"), _FIELDS)),
    st.tuples(st.just("labelSelector"), _LABELS),
    st.tuples(
        st.sampled_from(["limit", "timeoutSeconds"]),
        st.sampled_from(["", "1", "-1", "+1", "ten", "1_0", "９", "9223372036854775807", "9223372036854775808"]),
    ),
    st.tuples(st.sampled_from(["resourceVersion", "uid", "Watch"]), st.text(max_size=5)),
)


@st.composite
def targets(draw: st.DrawFn) -> str:
    segments = draw(st.lists(_SEGMENTS, max_size=6))
    path = draw(_PREFIXES) + "".join(f"/{segment}" for segment in segments) + draw(st.sampled_from(["", "", "/"]))
    quoted = draw(st.sampled_from([quote, quote_plus]))
    query = "&".join(f"{name}={quoted(value)}" for name, value in draw(st.lists(_PARAMETERS, max_size=4)))
    return path + ("?" + query if query else draw(st.sampled_from(["", "?", "?&&", "?watch", "?%77atch=1", "?a=%zz"])))


@settings(max_examples=600, deadline=None)
@given(method=_METHODS, target=targets())
@example(method="GET", target=f"/api/v1/pods?fieldSelector=metadata.name%3Dweb&limit={'0' * 5000}1")
@example(method="GET", target=f"/api/v1/pods?fieldSelector=metadata.name%3Dweb&limit={'1' * 5000}")
@example(method="GET", target="/api/v1/pods?fieldSelector=metadata.name%3Db,metadata.name%3Da")
@example(method="GET", target="/api/v1/pods?fieldSelector=metadata.name%3Dweb&limit=")
@example(method="GET", target="/api/v1/pods?fieldSelector=metadata.name%3Dweb&limit=9223372036854775808")
@example(method="GET", target="/api/v1/pods?fieldSelector=metadata.name%3Dweb&labelSelector=a%20in%20(b),c")
def test_whatever_is_read_is_read_as_kubernetes_reads_it(kubernetes: Kubernetes, method: str, target: str) -> None:
    try:
        reading = ours(method, target)
    except (PathError, MethodError):
        assume(False)
    assert reading == kubernetes.read(method, target)
