"""How a program starts, says how it is, and ends."""

import asyncio
import json
import logging
import signal
import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web

from kube import serve


async def fetch(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def test_readiness_names_what_is_not_ready_and_liveness_does_not_care() -> None:
    state: dict[str, str | None] = {"certificate": "none yet", "cache": None}
    checks = {name: (lambda name=name: state[name]) for name in state}
    async with serve.listening(serve.health(checks), port=0, host="127.0.0.1") as port:
        assert await fetch(port, "/readyz") == (503, "certificate: none yet")
        assert await fetch(port, "/livez") == (200, "ok")
        assert await fetch(port, "/healthz") == (200, "ok")
        state["certificate"] = None
        assert await fetch(port, "/readyz") == (200, "ok")


async def test_requests_under_way_end_and_new_ones_are_taken_while_draining() -> None:
    started, release, draining = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        started.set()
        await release.wait()
        return web.Response(text="whole")

    async def quick(_: web.Request) -> web.Response:
        return web.Response(text="quick")

    app = web.Application()
    app.add_routes([web.get("/slow", slow), web.get("/quick", quick)])

    async def ask_while_draining(port: int) -> tuple[int, str]:
        await draining.wait()
        answer = await fetch(port, "/quick")
        release.set()
        return answer

    async with (
        asyncio.TaskGroup() as tasks,
        serve.listening(app, port=0, host="127.0.0.1", drain=1.0, on_drain=draining.set) as port,
    ):
        under_way = tasks.create_task(fetch(port, "/slow"), name="request under way")
        late = tasks.create_task(ask_while_draining(port), name="request while draining")
        await started.wait()
    assert late.result() == (200, "quick")
    assert under_way.result() == (200, "whole")


PROGRAM = """
import asyncio
from kube import serve
async def main():
    {body}
serve.run("program", main)
"""


def start(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_sigterm_ends_the_program_in_order() -> None:
    process = start("print('up', flush=True)\n    try: await asyncio.sleep(60)\n    finally: print('cleaned up')")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    rest, log = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "cleaned up\n")
    assert json.loads(log)["message"] == "stopping on SIGTERM"


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("raise serve.SettingsError('PORT is no number')", 2, "program: PORT is no number"),
        ("serve.environment('NO_SUCH_VARIABLE')", 2, "program: the environment variable NO_SUCH_VARIABLE is not set"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
    ],
)
def test_a_program_that_cannot_go_on_says_why(body: str, code: int, last: str) -> None:
    process = start(body)
    _, log = process.communicate(timeout=30)
    assert process.returncode == code
    assert log.splitlines()[-1] == last


def test_what_is_given_as_extra_becomes_fields_of_the_log_line() -> None:
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "took %s", "args": (3,), "user": "u"})
    line = json.loads(serve.JsonFormatter("p").format(record))
    assert (line["message"], line["user"], line["level"], line["program"]) == ("took 3", "u", "info", "p")


@pytest.mark.parametrize(
    ("text", "number"),
    [(None, 8443), ("", 8443), ("1", 1), ("65535", 65535), ("0", None), ("65536", None), ("x", None)],
)
def test_a_number_from_the_environment_is_within_its_bounds(
    monkeypatch: pytest.MonkeyPatch, text: str | None, number: int | None
) -> None:
    if text is not None:
        monkeypatch.setenv("PORT", text)
    if number is None:
        with pytest.raises(serve.SettingsError, match="PORT"):
            serve.number("PORT", default=8443, low=1, high=65535)
    else:
        assert serve.number("PORT", default=8443, low=1, high=65535) == number
