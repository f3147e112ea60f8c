"""What a request asks for, in the terms in which Kubernetes authorizes it.

kube-apiserver authorizes a request by its own reading of the path and forwards the path untouched. We must read the
same thing out of it: a path that the two read differently would be authorized as one object and answered as another. So
this module works on the raw path, before any URL library has decoded or collapsed it, and refuses every spelling that
could be read in two ways.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs

_SPECIAL_VERBS = frozenset({"proxy", "watch"})
_NAMESPACE_SUBRESOURCES = frozenset({"status", "finalize"})
_VERBS_WITH_SELECTORS = frozenset({"list", "watch", "deletecollection"})
_VERBS_OF_METHODS = {
    "POST": "create",
    "GET": "get",
    "HEAD": "get",
    "PUT": "update",
    "PATCH": "patch",
    "DELETE": "delete",
}
# RFC 3986's unreserved characters, and those of its sub-delimiters that names of RBAC objects are made of. There is no
# "%" among them: nothing in a Kubernetes name needs it, and kube-apiserver forwards an encoded "/" as a plain one.
_SEGMENT = re.compile(r"[A-Za-z0-9._~:@+=,-]+")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NUMBERS = ("limit", "timeoutSeconds")
# Of a field selector: its terms up to each comma that no backslash escapes, operators, and the form of a value.
_TERM = re.compile(r"(?:[^,\\]|\\.|\\$)+", re.DOTALL)
_OPERATOR = re.compile(r"(!=|==|=)")
_VALUE = re.compile(r"(?:[^=,\\]|\\[\\,=])*", re.DOTALL)
# The plain form of a label selector: equality and sets, without the comparison of numbers and odd white space.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_PREFIX = r"(?=[^/]{1,253}/)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*/"
_REQUIREMENT = (
    rf"(?:!(?:{_PREFIX})?{_LABEL}|(?:{_PREFIX})?{_LABEL}"
    rf"(?: ?(?:==?|!=) ?(?:{_LABEL})?| (?:in|notin) ?\((?:{_LABEL})(?:, ?{_LABEL})*\))?)"
)
_LABEL_SELECTOR = re.compile(rf"(?:{_REQUIREMENT}(?:, ?{_REQUIREMENT})*)?")


class PathError(ValueError):
    """The path could be read in more than one way, or is no path of an API; the message says what is wrong."""


class MethodError(ValueError):
    """The path allows other methods only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestInfo:
    """The fields of `k8s.io/apiserver/pkg/endpoints/request.RequestInfo`.

    `parts` are the segments from the resource on; those after the subresource are not interpreted, so RBAC can't tell
    them apart.
    """

    path: str
    verb: str
    is_resource_request: bool = False
    api_prefix: str = ""
    api_group: str = ""
    api_version: str = ""
    namespace: str = ""
    resource: str = ""
    subresource: str = ""
    name: str = ""
    parts: tuple[str, ...] = ()
    field_selector: str = ""
    label_selector: str = ""
    query: dict[str, list[str]] = field(default_factory=dict, compare=False, repr=False)


def parse(method: str, target: str) -> RequestInfo:
    """Read a request line as RequestInfoFactory does.

    `target` is the request target in origin form (RFC 9112, 3.2.1), as it came over the wire. Raises `PathError` for
    what is not plainly one path, and `MethodError` for a `watch/` path with a method that does not watch:
    kube-apiserver gives those the verb `watch` whatever the method.
    """
    path, _, query_string = target.partition("?")
    segments = _segments(path)
    query = _query(query_string)
    if len(segments) < 3 or segments[0] not in ("api", "apis"):
        return RequestInfo(path=path, verb=method.lower(), query=query)
    prefix, *rest = segments
    group = ""
    if prefix == "apis":
        if len(rest) < 3:
            return RequestInfo(path=path, verb=method.lower(), api_prefix=prefix, query=query)
        group, *rest = rest
    version, *rest = rest

    verb = _VERBS_OF_METHODS.get(method, "")
    by_prefix = rest[0] in _SPECIAL_VERBS
    if by_prefix:
        if len(rest) < 2:
            raise PathError(f'"{path}" names no resource after "{rest[0]}"')
        verb, *rest = rest
        if verb == "watch" and method not in ("GET", "HEAD"):
            raise MethodError(f"{method} is not allowed on a watch; use GET")

    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 1:
        namespace = rest[1]
        if len(rest) > 2 and rest[2] not in _NAMESPACE_SUBRESOURCES:
            rest = rest[2:]

    subresource = rest[2] if len(rest) > 2 and verb != "proxy" else ""
    name = rest[1] if len(rest) > 1 else ""
    if not name:
        verb, name = _without_name(verb, query)
    selects = not by_prefix and verb in _VERBS_WITH_SELECTORS
    return RequestInfo(
        path=path,
        verb=verb,
        is_resource_request=True,
        api_prefix=prefix,
        api_group=group,
        api_version=version,
        namespace=namespace,
        resource=rest[0],
        subresource=subresource,
        name=name,
        parts=tuple(rest),
        field_selector=_first(query, "fieldSelector") if selects else "",
        label_selector=_first(query, "labelSelector") if selects else "",
        query=query,
    )


def _segments(path: str) -> list[str]:
    if not path.startswith("/"):
        raise PathError('the request target must be a path that begins with "/"')
    trimmed = path[1:].removesuffix("/")
    if not trimmed:
        if path != "/":
            raise PathError("the path has an empty segment")
        return []
    segments = trimmed.split("/")
    for segment in segments:
        if not segment:
            raise PathError("the path has an empty segment")
        if segment in (".", ".."):
            raise PathError(f'the path has the segment "{segment}"')
        if not _SEGMENT.fullmatch(segment):
            raise PathError('a segment of the path has a character other than letters, digits and "._~:@+=,-"')
    return segments


def _query(text: str) -> dict[str, list[str]]:
    """The parameters, decoded. Go leaves out what it can't decode, others keep it, so nothing of the kind passes."""
    if not text.isascii() or ";" in text or _BAD_ESCAPE.search(text):
        raise PathError('the query has ";", a character outside ASCII, or "%" without two hexadecimal digits')
    try:
        return parse_qs(text, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError as error:
        raise PathError("the query is not UTF-8") from error


def _without_name(verb: str, query: dict[str, list[str]]) -> tuple[str, str]:
    """The verb and name of a request whose path has no name."""
    if verb == "delete":
        return "deletecollection", ""
    if verb != "get":
        return verb, ""
    name = _name_selected(_first(query, "fieldSelector"))
    # Kubernetes decodes the list options as a whole: one that it can't read loses it the name too.
    readable = name is not None and all(_is_integer(query[option][0]) for option in _NUMBERS if option in query)
    if name and readable and not _LABEL_SELECTOR.fullmatch(_first(query, "labelSelector")):
        raise PathError("labelSelector is of a form that is not understood beside a name in fieldSelector")
    watch = query.get("watch", ["false"])[0]
    if not watch.isascii():  # Go folds "ſ" to "s" in one place and not in another
        raise PathError("watch must be true or false")
    verb = "list" if watch.lower() in ("false", "0") else "watch"
    return verb, name if name and readable else ""


def _name_selected(selector: str) -> str | None:
    """The name that a field selector demands by `metadata.name=`, empty if none; None if it can't be read.

    As `k8s.io/apimachinery/pkg/fields.ParseSelector` does it, which sorts the terms: of two names the first counts.
    """
    names = []
    for term in sorted(_TERM.findall(selector)):
        key, *comparison = _OPERATOR.split(term, maxsplit=1)
        if not comparison or not _VALUE.fullmatch(comparison[1]):
            return None
        operator, value = comparison
        if key == "metadata.name" and operator != "!=":
            names.append(re.sub(r"\\(.)", r"\1", value))
    name = names[0] if names else ""
    return "" if name in (".", "..") or "/" in name or "%" in name else name


def _is_integer(text: str) -> bool:
    """Whether Go's ParseInt takes it for 64 bits."""
    number = re.fullmatch(r"([+-]?)(?=[0-9])0*([0-9]{0,19})", text)  # Python reads no number of thousands of digits
    return number is not None and -(2**63) <= int(number[1] + (number[2] or "0")) < 2**63


def _first(query: dict[str, list[str]], name: str) -> str:
    return query.get(name, [""])[0]
