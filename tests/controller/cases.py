"""Captures and nodes as the tests need them."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from api.capturepolicy import Limits
from api.packetcapture import PacketCapture
from api.stamp import ANNOTATION, Stamp, spec_hash
from controller import reports
from controller.reports import NodeReport

Json = dict[str, Any]

START = datetime(2030, 1, 1, tzinfo=UTC)


def after(**span: float) -> datetime:
    return START + timedelta(**span)


def capture(
    name: str,
    *,
    uid: str = "",
    created: datetime = START,
    policy: str | None = "baseline",
    limit: int = 2,
    user: str = "alice",
    user_limit: int | None = None,
    namespace: str = "dev",
    status: Json | None = None,
    deleted: bool = False,
    **spec: Any,
) -> PacketCapture:
    """A capture with a fitting stamp of `policy`, or with none; it ends an hour after its start."""
    item: Json = {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{name}",
            "resourceVersion": "1",
            "generation": 1,
            "creationTimestamp": created,
            "deletionTimestamp": created if deleted else None,
        },
        "spec": {"selector": 'app == "web"'} | spec,
        "status": status or {},
    }
    if policy is not None:
        stamp = Stamp(
            user=user,
            policy=policy,
            limits=Limits(max_captures_per_namespace=limit, max_captures_per_user=user_limit),
            namespace=namespace,
            spec_hash=spec_hash(PacketCapture.model_validate(item).spec),
        )
        item["metadata"]["annotations"] = {ANNOTATION: stamp.to_annotation()}
    return PacketCapture.model_validate(item)


def node(name: str, *said: Json, heard: datetime = START) -> NodeReport:
    """The report of a node's agent, last heard at `heard`; each `said` is about the capture `web`, if not otherwise."""
    about = {"namespace": "dev", "name": "web", "uid": "uid-web", "state": "Capturing"}
    written = [json.dumps(about | one) for one in said]
    return reports.read({"metadata": {"name": name}, "status": {"heartbeatTime": heard, "reports": written}})
