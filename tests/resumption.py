"""A client that resumes its TLS 1.2 session, as an attacker would whose certificate is no longer trusted."""

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from kube.certificates import KeyPair, client_context


class RefusedError(Exception):
    """The server listens, and ends the handshake. asyncio's servers send no alert, so it does not say why."""


@dataclass
class Resuming:
    """Makes a connection for each request, with the session of the one before."""

    port: int
    server_name: str
    ca: bytes
    key_pair: KeyPair
    resumed: bool = False
    """Whether the server took the session up again at the last request."""

    def __post_init__(self) -> None:
        self._context = client_context(ca=self.ca, key_pair=self.key_pair)
        # In TLS 1.3 a server tells of a refusal only after the client's handshake is over.
        self._context.maximum_version = ssl.TLSVersion.TLSv1_2
        self._session: ssl.SSLSession | None = None

    def ask(self, path: str = "/", headers: Mapping[str, str] = {}) -> tuple[int, bytes]:
        """The code and the body of the answer. Blocks; raises `RefusedError`, and `OSError` for all else that fails."""
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as raw, self._secured(raw) as connection:
            self._session, self.resumed = connection.session, bool(connection.session_reused)
            connection.sendall("\r\n".join((*lines, "", "")).encode())
            with connection.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def _secured(self, raw: socket.socket) -> ssl.SSLSocket:
        try:
            return self._context.wrap_socket(raw, server_hostname=self.server_name, session=self._session)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError) as error:
            raise RefusedError from error
