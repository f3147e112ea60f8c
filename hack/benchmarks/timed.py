"""The API server as it is, with a clock around authentication and authorization, for `hack/bench api`.

`python -m hack.benchmarks.timed FILE` serves until it is told to end, and then writes to FILE as JSON how many seconds
the two took together, for each request.
"""

import array
import json
import sys
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from apiserver.__main__ import main as serve
from apiserver.aggregation.authentication import Authenticator
from apiserver.aggregation.authorization import Authorizer
from kube.serve import run


def install(times: "array.array[float]") -> None:
    """Have each request's time noted. What fails is not: it is not what is measured."""
    authenticate, authorize = Authenticator.authenticate, Authorizer.authorize
    spent: ContextVar[float] = ContextVar("spent", default=0.0)

    async def timed_authenticate(authenticator: Authenticator, *arguments: Any) -> Any:
        began = time.perf_counter()
        user = await authenticate(authenticator, *arguments)
        spent.set(time.perf_counter() - began)
        return user

    async def timed_authorize(authorizer: Authorizer, *arguments: Any) -> None:
        began = time.perf_counter()
        await authorize(authorizer, *arguments)
        times.append(spent.get() + time.perf_counter() - began)

    Authenticator.authenticate = timed_authenticate  # type: ignore[method-assign, assignment]
    Authorizer.authorize = timed_authorize  # type: ignore[method-assign, assignment]


def main() -> None:
    times = array.array("d")
    install(times)
    try:
        run("kubepcap-apiserver", serve)
    finally:
        Path(sys.argv[1]).write_text(json.dumps(list(times)))


if __name__ == "__main__":
    main()
