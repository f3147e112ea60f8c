"""How a program starts, says how it is, and ends without cutting anyone off."""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from aiohttp import web

from kube.certificates import ServerTLS
from kube.client import ConfigurationError
from kube.connections import Connections, Limits, Loss

_log = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""None when all is well, else what is not, in words."""


class SettingsError(Exception):
    """A setting from the environment is missing or can't be read; the message names it."""


def run(program: str, main: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    """Run `main` until it ends or the process gets SIGTERM or SIGINT, which cancel it, and exit.

    Exit code 0 after a signal, 2 for a setting that is wrong (one line on stderr), 1 for any other failure.
    """
    _log_as_json(program)
    try:
        asyncio.run(_until_signalled(main()))
    except (SettingsError, ConfigurationError) as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201 - a person started it with wrong settings
        sys.exit(2)
    sys.exit(0)


@asynccontextmanager
async def listening(
    app: web.Application,
    *,
    port: int,
    host: str | None = None,
    tls: ServerTLS | None = None,
    drain: float = 0.0,
    grace: float = 10.0,
    on_drain: Callable[[], None] | None = None,
    limits: Limits | None = None,
    on_loss: Callable[[Loss], None] = lambda _: None,
    cancels_abandoned: bool = False,
) -> AsyncIterator[int]:
    """Serve `app` while the block runs; yields the port (which is chosen by the system when `port` is 0).

    On the way out `on_drain` is called (readiness should fail from then on), requests are still taken for `drain`
    seconds, the time that the cluster needs to stop sending them, and those under way get `grace` seconds to end.
    `on_loss` is told of each connection that was closed for its limits, or whose TLS handshake failed.
    With `cancels_abandoned` a request is cancelled when its client leaves, else it goes on until it next writes.
    """
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - it has been set up
    connections = Connections(
        runner.server, limits=limits or Limits(), tls=tls, on_loss=on_loss, cancels_abandoned=cancels_abandoned
    )
    try:
        yield connections.listen(host, port)
    finally:
        if on_drain is not None:
            on_drain()
        # A task of its own: this one was cancelled, and then timeouts don't work before Python 3.11.3.
        await asyncio.create_task(_drained(runner, connections, drain, grace), name="draining")


async def _drained(runner: web.AppRunner, connections: Connections, drain: float, grace: float) -> None:
    await asyncio.sleep(drain)
    await connections.close(grace)
    await runner.cleanup()


HEALTH_LIMITS = Limits(connections=64, head_bytes=16 << 10, line_bytes=4 << 10, body_bytes=16 << 10)
"""Of clients of `health`: a kubelet, Prometheus, and whoever else can reach its port."""


def health(checks: Mapping[str, Check], *, metrics: Callable[[], bytes] | None = None) -> web.Application:
    """`/healthz` and `/livez` answer 200 while the event loop turns, `/readyz` 503 with what is not ready.

    `/metrics` answers what `metrics` gives, in Prometheus' text format.
    """

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def ready(_: web.Request) -> web.Response:
        wrong = unready(checks)
        return web.Response(text="\n".join(wrong), status=503) if wrong else web.Response(text="ok")

    app = web.Application()
    app.add_routes([web.get("/healthz", live), web.get("/livez", live), web.get("/readyz", ready)])
    if metrics is not None:
        content_type = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}

        async def show(_: web.Request) -> web.Response:
            return web.Response(body=metrics(), headers=content_type)

        app.router.add_get("/metrics", show)
    return app


def unready(checks: Mapping[str, Check]) -> list[str]:
    """What is not ready, a line each."""
    return [f"{name}: {reason}" for name, check in checks.items() if (reason := check()) is not None]


def environment(name: str, default: str | None = None) -> str:
    """A setting. Raises `SettingsError` when it is missing and has no default."""
    value = os.environ.get(name) or default
    if value is None:
        raise SettingsError(f"the environment variable {name} is not set")
    return value


def number(name: str, *, default: int, low: int = 0, high: int) -> int:
    """A whole number from the environment. Raises `SettingsError` when it is none, or out of range."""
    value = environment(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) <= 18 and low <= int(value) <= high):
        raise SettingsError(f"{name} must be a number from {low} to {high}, not {value!r}")
    return int(value)


def flag(name: str, *, default: bool) -> bool:
    """`true` or `false` from the environment. Raises `SettingsError` when it is neither."""
    value = environment(name, "true" if default else "false")
    if value not in {"true", "false"}:
        raise SettingsError(f"{name} must be true or false, not {value!r}")
    return value == "true"


async def _until_signalled(main: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(main, name="main")
    loop = asyncio.get_running_loop()
    signalled = False

    def stop(number: signal.Signals) -> None:
        nonlocal signalled
        if not signalled:  # a second signal must not cut the drain short
            signalled = True
            _log.info("stopping on %s", number.name)
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled:
            raise


def _log_as_json(program: str) -> None:
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(program))
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "INFO", handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record; what was given as `extra` becomes fields of their own."""

    _standard = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "program": self._program,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in self._standard}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
