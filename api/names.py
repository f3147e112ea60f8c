"""Names that reach a path, a URL or a certificate: how they are made, and how a foreign one is told from ours.

Standard library only, since the capturer makes file names.
"""

import calendar
import re
import time

SUFFIX = ".pcap"

WEBHOOK_PATH_SECRET = "kubepcap-webhook-path"  # noqa: S105 - its name
"""The Secret with the last segment of the webhook's paths, which only kube-apiserver is to know."""
WEBHOOK_PATH_KEY = "path"

_LONGEST_POD = 150
_DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
# As JSON Schema reads them too (ECMA-262), for whom they are said in OpenAPI.
UID_PATTERN = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
DNS_SUBDOMAIN_PATTERN = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
FILE_NAME_PATTERN = (
    r"[a-z0-9][-a-z0-9.]{0,149}_[A-Za-z0-9.@+=-]{1,15}-[0-9]{8}T[0-9]{6}\.[0-9]{9}Z-[0-9a-f]{8}-[0-9]{1,10}"
    r"\.pcap"
)
_UID = re.compile(UID_PATTERN)
_STATIC_POD_UID = re.compile(r"[0-9a-f]{32}")  # kubelet gives it, a hash
_DNS_SUBDOMAIN = re.compile(DNS_SUBDOMAIN_PATTERN)
_WEBHOOK_PATH = re.compile(r"[a-z0-9]{16,63}")
_UNSAFE_IN_INTERFACE = re.compile(r"[^A-Za-z0-9.@+-]")
_FILE_NAME = re.compile(FILE_NAME_PATTERN)


def file_name(*, pod: str, interface: str, created_ns: int, pod_uid: str, sequence: int) -> str:
    """The name of a capture file, given at its creation (`created_ns`: nanoseconds since 1970) and never changed.

    `<pod, at most 150 characters>_<interface>-<UTC time>-<pod UID, 8>-<sequence>.pcap`. A character of the interface's
    name that is not safe in a path or URL becomes `=`; the kernel allows all but `/` and white space (dev_valid_name).
    """
    if not (is_uid(pod_uid) or _STATIC_POD_UID.fullmatch(pod_uid)):
        raise ValueError(f"{pod_uid!r} is no UID")
    if not is_dns_subdomain(pod):
        raise ValueError(f"{pod!r} is no name of a pod")
    interface = _UNSAFE_IN_INTERFACE.sub("=", interface)[:15]
    name = f"{pod[:_LONGEST_POD]}_{interface}-{_compact_time(created_ns)}-{pod_uid[:8]}-{sequence}{SUFFIX}"
    if not is_file_name(name):
        raise ValueError(f"{name!r} can't name a capture file")
    return name


def is_file_name(text: str) -> bool:
    """Whether `file_name` could have made it: so it is no path, not hidden, and needs no quoting in a URL."""
    return _FILE_NAME.fullmatch(text) is not None


def created(name: str) -> int:
    """When the file of this valid name was created, in nanoseconds since 1970."""
    _, moment, _, _ = name.rsplit("-", 3)
    seconds, fraction = moment.removesuffix("Z").split(".")
    return calendar.timegm(time.strptime(seconds, "%Y%m%dT%H%M%S")) * 1_000_000_000 + int(fraction)


def is_uid(text: str) -> bool:
    """Whether it is a UID as kube-apiserver gives them (RFC 9562, lower case)."""
    return _UID.fullmatch(text) is not None


def is_dns_subdomain(text: str) -> bool:
    """Whether it can name a node, a pod or another object (RFC 1123 subdomain)."""
    return len(text) <= 253 and _DNS_SUBDOMAIN.fullmatch(text) is not None


def agent_server_name(node: str) -> str:
    """The DNS name in the certificate of the node's agent; it is resolved nowhere."""
    return f"{node}.agent.kubepcap"


def is_webhook_path(text: str) -> bool:
    """Whether it can be the unguessable segment: kube-apiserver wants a DNS label, and we want it long."""
    return _WEBHOOK_PATH.fullmatch(text) is not None


def format_time(nanoseconds: int) -> str:
    """RFC 3339, UTC, nanoseconds, from nanoseconds since 1970."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction:09d}Z"


def _compact_time(nanoseconds: int) -> str:
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}.{fraction:09d}Z"
