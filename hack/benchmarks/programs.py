"""The benchmarks' own C programs, compiled once into the cache: what makes and counts packets must outrun a capture."""

import fcntl
import hashlib
import subprocess
from pathlib import Path

from hack.clusters.binaries import HACK
from hack.clusters.cluster import cache
from hack.clusters.failure import Failure

_SOURCES = Path(__file__).parent
_COMPILE = ("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


def install(*packages: str) -> None:
    """Install those of Debian's packages that are missing. Raises Failure."""
    done = subprocess.run([HACK / "packages", *packages], check=False)
    if done.returncode:
        raise Failure(f"these packages are needed: {' '.join(packages)}")


def build(name: str) -> Path:
    """The program of this name, compiled when its source is new. Raises Failure."""
    source = _SOURCES / f"{name}.c"
    digest = hashlib.sha256(repr(_COMPILE).encode() + source.read_bytes()).hexdigest()[:12]
    directory = cache() / "benchmarks"
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / f"{name}-{digest}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            install("gcc", "libc6-dev")
            made = program.with_suffix(".new")
            done = subprocess.run([*_COMPILE, "-o", made, source], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Failure(f"{source.name} does not compile:\n{done.stderr}")
            made.rename(program)
    return program
