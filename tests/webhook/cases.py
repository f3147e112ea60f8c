"""Requests and policies as the tests need them."""

import base64
import json
from copy import deepcopy
from typing import Any

from api.capturepolicy import CapturePolicy
from api.packetcapture import PacketCapture
from api.stamp import ANNOTATION, Stamp, spec_hash
from webhook.review import Request, User

Json = dict[str, Any]

ALICE = User(username="alice", groups=("system:authenticated",))


def policy(name: str, **spec: Any) -> CapturePolicy:
    return CapturePolicy.model_validate({"metadata": {"name": name}, "spec": spec})


def capture(*, stamp: str | None = None, **spec: Any) -> Json:
    """A capture in dev; `stamp` is the annotation it carries."""
    metadata: Json = {"name": "web", "namespace": "dev"}
    if stamp is not None:
        metadata["annotations"] = {ANNOTATION: stamp}
    return {
        "apiVersion": "kubepcap.io/v1",
        "kind": "PacketCapture",
        "metadata": metadata,
        "spec": {"selector": 'app == "web"'} | spec,
    }


def stamped(*, user: str = "alice", by: CapturePolicy, **spec: Any) -> Json:
    """A capture with the stamp that admission gives."""
    item = capture(**spec)
    return capture(stamp=annotation(item, user=user, by=by), **spec)


def annotation(item: Json, *, user: str = "alice", by: CapturePolicy) -> str:
    hashed = spec_hash(PacketCapture.model_validate(item).spec)
    return Stamp(
        user=user, policy=by.metadata.name, limits=by.spec.limits, namespace="dev", spec_hash=hashed
    ).to_annotation()


def earlier_annotation(item: Json) -> str:
    """Alice's stamp by a policy `baseline` with the default limits, as before limits had `maxStartDelay` and others."""
    hashed = spec_hash(PacketCapture.model_validate(item).spec)
    return (
        '{"limits":{"maxBytesPerNode":2000000000,"maxCapturesPerNamespace":10,"maxDuration":"1h0m0s",'
        '"maxFileSize":100000000,"maxFiles":10,"maxSnapLength":262144,"ringSize":4194304},'
        f'"namespace":"dev","policy":"baseline","specHash":"{hashed}","user":"alice"}}'
    )


def create(item: Json, *, user: User = ALICE) -> Request:
    return _request("CREATE", item, None, user)


def update(old: Json, new: Json, *, user: User = ALICE) -> Request:
    return _request("UPDATE", new, old, user)


def patched(item: Json, patch: Any) -> Json:
    """The object after a JSON patch (RFC 6902) of the operations that stamping makes."""
    item = deepcopy(item)
    for step in patch:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
        target = item
        for part in parents:
            target = target[part]
        if step["op"] == "remove":
            del target[last]
        else:
            target[last] = step["value"]
    return item


def patched_by(item: Any, response: Json) -> Any:
    """The object after what the webhook answered."""
    return patched(item, json.loads(base64.b64decode(response["patch"]))) if "patch" in response else item


def _request(operation: str, item: Json, old: Json | None, user: User) -> Request:
    return Request.model_validate(
        {
            "uid": "u-1",
            "resource": {"group": "kubepcap.io", "version": "v1", "resource": "packetcaptures"},
            "operation": operation,
            "name": item["metadata"].get("name", ""),
            "namespace": "dev",
            "userInfo": user,
            "object": item,
            "oldObject": old,
        }
    )
