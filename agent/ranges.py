"""Which part of a file a request asks for (RFC 9110, section 14), as a pure function."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))")


class UnsatisfiableError(ValueError):
    """The part lies beyond the file's end, or the request can't be read; the text says which."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes from `start` up to, not including, `end`. `partial` says that the answer is a 206."""

    start: int
    end: int
    partial: bool = False

    @property
    def length(self) -> int:
        return self.end - self.start


def part(size: int, *, header: str | None = None, offset: str | None = None, limit: str | None = None) -> Part:
    """The part of `size` bytes that a Range header, or else the parameters offset and limit, ask for.

    A header that is no single range of bytes is ignored, as the RFC allows. An offset at the very end is an empty part,
    so that a reader of a growing file can ask again. Raises UnsatisfiableError.
    """
    if header is not None and (match := _RANGE.fullmatch(header.replace(" ", ""))):
        return _from_header(size, *match.groups())
    start = _number("offset", offset, default=0)
    if start > size:
        raise UnsatisfiableError(f"offset {start} is beyond the {size} bytes of the file")
    length = _number("limit", limit, default=size - start)
    return Part(start, min(start + length, size))


def _from_header(size: int, first: str | None, last: str | None, suffix: str | None) -> Part:
    if suffix is not None:
        start, end = max(0, size - int(suffix)), size
    else:
        start, end = int(first or 0), size if last is None else min(int(last) + 1, size)
        if last is not None and int(last) < start:
            return Part(0, size)
    if start >= end:
        raise UnsatisfiableError(f"the range begins beyond the {size} bytes of the file")
    return Part(start, end, partial=True)


def _number(name: str, text: str | None, *, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UnsatisfiableError(f"{name} must be a number of bytes, not {text!r}")
    return int(text)
