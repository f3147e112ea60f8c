"""What a measurement was made on: without that its numbers say nothing."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores, versions, and what else the machine was doing when the measurement began."""

    cores: int
    processor: str
    memory_gib: float
    kernel: str
    python: str
    load: float
    programs: dict[str, str]

    @classmethod
    def describe(cls, *programs: str) -> Self:
        """This machine, with the versions of these programs."""
        return cls(
            cores=len(os.sched_getaffinity(0)),
            processor=_processor(Path("/proc/cpuinfo").read_text()),
            memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            kernel=platform.release(),
            python=platform.python_version(),
            load=os.getloadavg()[0],
            programs={key: value for program in programs for key, value in _versions(program).items()},
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.programs.items())
        return (
            f"{self.cores} cores ({self.processor}), {self.memory_gib} GiB, Linux {self.kernel}, Python {self.python}"
            + (f", {versions}" if versions else "")
            + f"; load {self.load:.2f} when it began"
        )


def _processor(cpuinfo: str) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _versions(program: str) -> dict[str, str]:
    """What `PROGRAM --version` says of the program, and of libpcap where it says that too."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    match = re.search(r"\d+(\.\d+)+", said)
    found = {program: match[0] if match else "of an unknown version"}
    if match := re.search(r"libpcap version (\S+)", said):
        found["libpcap"] = match[1]
    return found
