"""`metav1.Status`: the form in which Kubernetes says that a request failed.

The same exception is raised when kube-apiserver refuses a request of ours and when we refuse one of a user's, so that a
refusal can pass through a program without a change of words.
"""

import json
from http import HTTPStatus
from typing import Any, Self

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    406: "NotAcceptable",
    409: "Conflict",
    410: "Gone",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class StatusError(Exception):
    """A request failed, with the code, reason and message of `metav1.Status`.

    `retry_after` is in seconds; kubectl repeats a request that carries it, so it belongs only on what passes.
    """

    def __init__(
        self,
        code: int,
        message: str,
        *,
        reason: str | None = None,
        details: dict[str, Any] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = _REASONS.get(code, "") if reason is None else reason
        self.details = details
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        """The object as Kubernetes writes it."""
        status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        details = dict(self.details or {})
        if self.retry_after is not None:
            details["retryAfterSeconds"] = self.retry_after
        if details or self.details is not None:
            status["details"] = details
        return status

    @classmethod
    def parse(cls, code: int, body: bytes) -> Self:
        """Read a failed answer; one that is no `Status` (a proxy's page, say) keeps its code and its first words."""
        try:
            status = json.loads(body)
        except ValueError:
            status = None
        if not isinstance(status, dict) or status.get("kind") != "Status":
            said = body[:200].decode(errors="replace").strip()
            return cls(code, said or _phrase(code))
        details = status.get("details")
        if not isinstance(details, dict):
            details = None
        retry_after = (details or {}).get("retryAfterSeconds")
        return cls(
            code,
            str(status.get("message") or _phrase(code)),
            reason=str(status.get("reason") or ""),
            details=details,
            retry_after=retry_after if isinstance(retry_after, int) else None,
        )


def bad_request(message: str) -> StatusError:
    return StatusError(400, message)


def unauthorized(message: str = "Unauthorized") -> StatusError:
    return StatusError(401, message)


def forbidden(message: str) -> StatusError:
    return StatusError(403, message)


def not_found(resource: str, name: str, *, hint: str = "") -> StatusError:
    """`resource` as Kubernetes writes it in messages: `packetcaptures.kubepcap.io`; `hint` follows the usual words."""
    message = f'{resource} "{name}" not found'
    kind = resource.split(".", 1)[0]
    return StatusError(404, f"{message}: {hint}" if hint else message, details={"name": name, "kind": kind})


def method_not_allowed(message: str) -> StatusError:
    return StatusError(405, message)


def gone(message: str) -> StatusError:
    return StatusError(410, message)


def too_many_requests(message: str, *, retry_after: int) -> StatusError:
    return StatusError(429, message, retry_after=retry_after)


def internal_error(message: str) -> StatusError:
    return StatusError(500, message)


def service_unavailable(message: str, *, retry_after: int | None = None) -> StatusError:
    return StatusError(503, message, retry_after=retry_after)


def timed_out(message: str) -> StatusError:
    """In the words of `k8s.io/apimachinery` (`NewTimeoutError`)."""
    return StatusError(504, f"Timeout: {message}")


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return f"HTTP status {code}"
