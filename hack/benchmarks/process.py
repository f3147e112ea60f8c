"""What a process has cost so far, as the kernel counts it."""

import os
import re
import subprocess
import time
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, also of those that ended, to the nanosecond (clock_getcpuclockid(3)).

    /proc/PID/stat has the same in ticks of 10 ms, which is too coarse here. Raises OSError when it is gone.
    """
    return time.clock_gettime((~pid << 3) | 2)


def ended(process: subprocess.Popen[bytes], *, timeout: float) -> float:
    """Wait for the end of a process of ours; returns the CPU seconds of its whole life (wait4(2)).

    Raises subprocess.TimeoutExpired.
    """
    deadline = time.monotonic() + timeout
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, timeout)
        time.sleep(0.005)


def peak_rss(pid: int) -> int:
    """The most memory that a process has had resident, in bytes."""
    return _status(pid, "VmHWM")


def rss(pid: int) -> int:
    """The memory that a process has resident now, in bytes."""
    return _status(pid, "VmRSS")


def ring_rss(pid: int) -> int:
    """How much of it are packet rings, that is, mappings of sockets, in bytes."""
    sizes = re.findall(
        r"^\S+ \S+ \S+ \S+ \S+ +socket:\S+\n(?:\w+: .*\n)*?Rss: +(\d+) kB",
        Path(f"/proc/{pid}/smaps").read_text(),
        re.MULTILINE,
    )
    return sum(map(int, sizes)) * 1024


def _status(pid: int, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if match is None:
        raise ProcessLookupError(f"process {pid} has no {field}: it has ended")
    return int(match[1]) * 1024
