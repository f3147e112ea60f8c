"""Asks an API server the same thing over and over, in a process of its own, for `hack/bench api`.

It reads what to ask from standard input as JSON and prints how long each answer took. Connections are kept, and each
waits for its answer before it asks again.
"""

import http.client
import json
import socket
import ssl
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

_WARMING: Final = 20
_PATIENCE: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """`count` calls in all, over so many connections at once; `name` is the one in the server's certificate."""

    address: str
    port: int
    name: str
    ca: str
    certificate: Path
    key: Path
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    connections: int = 1
    count: int = 200

    @property
    def asked(self) -> int:
        """How many requests the server gets, those before any is timed included."""
        return self.connections * (_WARMING + self.count // self.connections)

    @classmethod
    def parse(cls, text: str) -> Self:
        given = json.loads(text)
        return cls(**given | {name: Path(given[name]) for name in ("certificate", "key")})

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)


@dataclass(frozen=True, slots=True)
class Called:
    """Seconds that each call took, and how often each code was answered."""

    times: list[float]
    codes: dict[str, int]


def call(calls: Calls) -> Called:
    """Make the calls. Raises OSError or http.client.HTTPException when a connection fails."""
    tls = ssl.create_default_context(cadata=calls.ca)
    tls.load_cert_chain(calls.certificate, calls.key)

    def work(_: int) -> list[tuple[float, int]]:
        connection = http.client.HTTPConnection(calls.name, timeout=_PATIENCE)
        plain = socket.create_connection((calls.address, calls.port), timeout=_PATIENCE)
        with tls.wrap_socket(plain, server_hostname=calls.name) as connection.sock:
            for _ in range(_WARMING):
                _ask(connection, calls)
            return [_ask(connection, calls) for _ in range(calls.count // calls.connections)]

    with ThreadPoolExecutor(calls.connections) as threads:
        answers = [answer for answers in threads.map(work, range(calls.connections)) for answer in answers]
    return Called([seconds for seconds, _ in answers], dict(Counter(str(code) for _, code in answers)))


def _ask(connection: http.client.HTTPConnection, calls: Calls) -> tuple[float, int]:
    began = time.perf_counter()
    connection.request("GET", calls.path, headers=calls.headers)
    answer = connection.getresponse()
    answer.read()
    return time.perf_counter() - began, answer.status


def main() -> None:
    print(json.dumps(asdict(call(Calls.parse(sys.stdin.read())))))


if __name__ == "__main__":
    main()
