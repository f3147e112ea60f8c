"""Which capture a request means.

Files belong to a capture's UID, while a URL names it. So the capture is read for every request: one that was deleted
has no files any more, and one that was made anew under an old name does not give away its predecessor's.
"""

from urllib.parse import quote

from api.files import RESOURCE, SUBRESOURCE, CaptureReference
from api.names import is_uid
from api.object import SUBRESOURCES_GROUP, VERSION
from apiserver.aggregation.group import Call
from kube.client import PACKETCAPTURES, Client
from kube.status import StatusError, bad_request, gone, internal_error


async def read(client: Client, call: Call) -> CaptureReference:
    """The capture that the request names.

    Raises `StatusError`: 404 when there is none, 410 when `?uid=` is another's, 5xx when it can't be read.
    """
    name, namespace = call.info.name, call.info.namespace
    try:
        capture = await client.get(PACKETCAPTURES, name, namespace=namespace)
    except StatusError as error:
        if error.code == 404 or error.code >= 500:
            raise
        raise internal_error(f"the capture could not be read: {error.message}") from error
    uid = str(capture["metadata"]["uid"])
    if not is_uid(uid):
        raise internal_error(f"the capture has a UID of a form that is not known: {uid}")
    wanted = call.info.query.get("uid", [uid])[0]
    if not is_uid(wanted):
        raise bad_request(f"uid must be the UID of the capture, such as {uid}")
    if wanted != uid:
        raise gone(
            f'packetcaptures.{PACKETCAPTURES.group} "{name}" is another capture now (UID {uid}); '
            f"the one with UID {wanted} is deleted, and its files with it"
        )
    return CaptureReference(namespace=namespace, name=name, uid=uid)


def files_url(capture: CaptureReference) -> str:
    """The path under kube-apiserver that lists the capture's files."""
    return (
        f"/apis/{SUBRESOURCES_GROUP}/{VERSION}/namespaces/{quote(capture.namespace)}"
        f"/{RESOURCE}/{quote(capture.name)}/{SUBRESOURCE}"
    )


def file_url(capture: CaptureReference, node: str, name: str) -> str:
    """The path under kube-apiserver that downloads a file, for as long as the capture is the same."""
    return f"{files_url(capture)}/{quote(node)}/{quote(name, safe='@+=')}?uid={capture.uid}"
