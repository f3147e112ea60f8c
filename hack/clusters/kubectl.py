"""kubectl as this project's tools and tests call it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from hack.clusters.binaries import find
from hack.clusters.cluster import Cluster
from hack.clusters.failure import Failure

Process = subprocess.Popen[bytes]


def environment(cluster: Cluster) -> dict[str, str]:
    """The environment in which kubectl is the cluster's own and speaks to it."""
    path = f"{find('kubectl').parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return os.environ | {"KUBECONFIG": str(cluster.kubeconfig), "PATH": path, "KUBEPCAP_CLUSTER": cluster.name}


class Kubectl:
    """The cluster's own kubectl with a kubeconfig. `user` and `groups` impersonate, as `--as` and `--as-group` do."""

    def __init__(self, kubeconfig: Path) -> None:
        self._program = str(find("kubectl"))
        self._environment = os.environ | {"KUBECONFIG": str(kubeconfig)}

    def __call__(
        self,
        *arguments: str,
        user: str | None = None,
        groups: tuple[str, ...] = (),
        input: str | None = None,  # noqa: A002
        check: bool = True,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end. With `check`, Failure holds what it said."""
        who = [] if user is None else [f"--as={user}", *(f"--as-group={group}" for group in groups)]
        # `--` may end the arguments, so what is added goes first
        done = subprocess.run(
            [self._program, *who, *arguments],
            env=self._environment,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise Failure(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def bytes(self, *arguments: str, user: str | None = None, timeout: float = 120) -> bytes:
        """What kubectl writes to standard output, as it is: for files."""
        who = [] if user is None else [f"--as={user}"]
        done = subprocess.run(
            [self._program, *who, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise Failure(f"kubectl {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout

    def start(self, *arguments: str) -> Process:
        """Start kubectl and go on, for what runs until it is told to stop; its output and errors are pipes."""
        return subprocess.Popen(
            [self._program, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def json(self, *arguments: str, user: str | None = None) -> Any:
        return json.loads(self(*arguments, "--output=json", user=user).stdout)
