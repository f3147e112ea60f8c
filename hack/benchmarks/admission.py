"""The webhook as it is, but for its certificate and path, which `hack/bench webhook` gives it.

`python -m hack.benchmarks.admission DIRECTORY` serves with DIRECTORY's `webhook.crt` and `webhook.key`, prints its
port, and goes on until it is killed. It is the user of $KUBECONFIG.
"""

import asyncio
import sys
from pathlib import Path
from typing import Final

from kube.certificates import KeyPair, ServerTLS
from kube.client import Client
from kube.serve import listening, run
from webhook.admission import Admission
from webhook.server import LIMITS, application

PATH: Final = "0123456789abcdef"


async def serve() -> None:
    directory = Path(sys.argv[1])
    tls = ServerTLS(client_certificates="none")
    certificate, key = ((directory / f"webhook.{part}").read_bytes() for part in ("crt", "key"))
    tls.use(key_pair=KeyPair.of(certificate=certificate, key=key))
    async with Client.connect(user_agent="kubepcap-webhook") as client, asyncio.TaskGroup() as tasks:
        admission = Admission(client)
        tasks.create_task(admission.policies.run(), name="policies")
        tasks.create_task(admission.namespaces.run(), name="namespaces")
        await admission.policies.synced()
        await admission.namespaces.synced()
        app = application(admission, paths=lambda: frozenset({PATH}))
        async with listening(app, port=0, host="127.0.0.1", tls=tls, limits=LIMITS) as port:
            print(port, flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    run("webhook", serve)
