"""How kube-apiserver is reached; what it answers is the business of tests/cluster/test_client.py."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from kube.client import CONFIGMAPS, Client
from kube.serve import listening
from kube.status import StatusError


@dataclass
class Asked:
    """A server that answers everything with an object, and what it was asked."""

    port: int = 0
    targets: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.targets.append(request.raw_path)
        return web.json_response({"kind": "ConfigMap"})


@pytest_asyncio.fixture
async def asked() -> AsyncIterator[Asked]:
    made = Asked()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    async with listening(app, host="127.0.0.1", port=0, grace=0) as made.port:
        yield made


class CountedThreads(ThreadPoolExecutor):
    count = 0

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        self.count += 1
        return super().submit(work, *arguments, **named)


def kubeconfig(directory: Path, server: str) -> Path:
    path = directory / "kubeconfig"
    config = {
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return path


async def test_a_request_takes_no_thread(asked: Asked, tmp_path: Path) -> None:
    config = kubeconfig(tmp_path, f"http://127.0.0.1:{asked.port}")
    async with Client.connect(user_agent="test", kubeconfig=config) as client:
        with CountedThreads() as threads:
            asyncio.get_running_loop().set_default_executor(threads)
            for _ in range(3):
                assert await client.get(CONFIGMAPS, "a", namespace="n") == {"kind": "ConfigMap"}
    assert len(asked.targets) == 3
    assert threads.count == 0


@pytest.mark.parametrize(("server", "through_proxy"), [("kube.test", True), ("127.0.0.1", False)])
async def test_a_proxy_that_the_environment_names_is_used(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, through_proxy: bool
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{asked.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = kubeconfig(tmp_path, f"http://{server}:{asked.port}")
    async with Client.connect(user_agent="test", kubeconfig=config) as client:
        await client.get(CONFIGMAPS, "a", namespace="n")
    path = "/api/v1/namespaces/n/configmaps/a"
    assert asked.targets == [f"http://{server}:{asked.port}{path}" if through_proxy else path]


@dataclass
class Pages:
    """A server of pages of one object each, which are larger and larger."""

    sizes: list[int] = field(default_factory=list)
    encodings: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.encodings.append(request.headers["Accept-Encoding"])
        page = {"items": [{"data": "x" * 1000 * len(self.encodings)}], "metadata": {"continue": "more"}}
        body = json.dumps(page).encode()
        self.sizes.append(len(body))
        response = web.Response(body=body)
        response.enable_compression()
        return response


async def test_a_page_of_more_bytes_than_are_wanted_is_not_read(tmp_path: Path) -> None:
    server = Pages()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    async with listening(app, host="127.0.0.1", port=0, grace=0) as port:
        config = kubeconfig(tmp_path, f"http://127.0.0.1:{port}")
        async with Client.connect(user_agent="test", kubeconfig=config) as client:
            pages = client.pages(CONFIGMAPS, namespace="n", most_bytes=5000)
            for _ in range(4):
                assert len((await anext(pages)).items) == 1
            with pytest.raises(StatusError, match="the answer has more than 5000 bytes") as refused:
                await anext(pages)
    assert refused.value.code == 413
    assert [size <= 5000 for size in server.sizes] == [True] * 4 + [False]
    assert server.encodings == ["identity"] * 5
