"""The few questions that starting a cluster asks of its API server, without a kubectl process for each."""

import base64
import http.client
import json
import ssl
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Api:
    """An API server as a kubeconfig of ours reaches it, at `address` over `tls`, whatever proxy is set."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.address = urllib.parse.urlsplit(cluster["server"])
        ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.tls = ssl.create_default_context(cadata=ca)
        with tempfile.NamedTemporaryFile() as pair:  # ssl takes a client's certificate from a file only
            pair.write(base64.b64decode(user["client-certificate-data"]))
            pair.write(base64.b64decode(user["client-key-data"]))
            pair.flush()
            self.tls.load_cert_chain(pair.name)

    def get(self, path: str) -> Any:
        """The decoded body of an answer 200; OSError or http.client.HTTPException when there is no such answer."""
        connection = http.client.HTTPSConnection(
            self.address.hostname or "", self.address.port, timeout=5, context=self.tls
        )
        try:
            connection.request("GET", path, headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise http.client.HTTPException(f"{path}: {answer.status} {answer.reason}")
        return json.loads(body) if body.startswith(b"{") else body.decode()

    def ready(self) -> bool:
        return answers(lambda: self.get("/readyz") == "ok")

    def ready_nodes(self) -> set[str]:
        """The names of the nodes whose kubelet says that they are ready."""
        return {
            node["metadata"]["name"]
            for node in self.get("/api/v1/nodes")["items"]
            for condition in node["status"].get("conditions", ())
            if condition["type"] == "Ready" and condition["status"] == "True"
        }


def answers(question: Callable[[], bool]) -> bool:
    """What the question finds, or False while nothing answers it yet."""
    try:
        return question()
    except (OSError, http.client.HTTPException):
        return False
