"""Sends reviews to the webhook at a steady rate, in a process of its own, for `hack/bench webhook`.

It reads what to send from standard input as JSON. A review is sent when its time has come, whether or not others have
been answered, and its time counts from then: a webhook that falls behind does not hide that by slowing the sender.
"""

import asyncio
import json
import ssl
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Final, Self

import aiohttp

_PATIENCE: Final = aiohttp.ClientTimeout(total=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviews:
    """`rate` a second for so many seconds: each a path and a body, in turn. `ca` is PEM."""

    url: str
    ca: str
    rate: float
    seconds: float
    bodies: list[tuple[str, str]]

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Reviewed:
    """Seconds from when each review was due to its answer, and how often each verdict was given."""

    times: list[float]
    verdicts: dict[str, int]


async def send(reviews: Reviews) -> Reviewed:
    """Send all of them, and wait for the last answer."""
    tls = ssl.create_default_context(cadata=reviews.ca)
    times: list[float] = []
    verdicts: Counter[str] = Counter()
    began = time.perf_counter()

    async def one(session: aiohttp.ClientSession, due: float, path: str, body: str) -> None:
        try:
            async with session.post(path, data=body) as answer:
                response = (await answer.json())["response"] if answer.status == 200 else {}
            refusal = response.get("status", {}).get("code", answer.status)
            verdict = "allowed" if response.get("allowed") else f"refused with {refusal}"
        except (aiohttp.ClientError, TimeoutError) as error:
            verdict = type(error).__name__
        times.append(time.perf_counter() - due)
        verdicts[verdict] += 1

    connector = aiohttp.TCPConnector(ssl=tls, limit=256)
    async with (
        aiohttp.ClientSession(reviews.url, connector=connector, timeout=_PATIENCE) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(round(reviews.rate * reviews.seconds)):
            due = began + number / reviews.rate
            if (ahead := due - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            path, body = reviews.bodies[number % len(reviews.bodies)]
            tasks.create_task(one(session, due, path, body), name=f"review {number}")
    return Reviewed(times, dict(verdicts))


def main() -> None:
    print(json.dumps(asdict(asyncio.run(send(Reviews.parse(sys.stdin.read()))))))


if __name__ == "__main__":
    main()
