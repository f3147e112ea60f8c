"""How the cluster's tools fail: one sentence that says what to do, and the end of the log that tells why."""

from pathlib import Path


class Failure(Exception):  # noqa: N818
    """Something that the person at the keyboard has to know. `log` is the file to read, when there is one."""

    def __init__(self, message: str, *, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log

    def __str__(self) -> str:
        message = super().__str__()
        if self.log is None:
            return message
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-20:]
        except FileNotFoundError:
            lines = []
        return "\n".join([*(f"    {line}" for line in lines), message, f"the whole log is {self.log}"])
