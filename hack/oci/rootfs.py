"""How a base and what is added to it are made: the commands that both this machine and the Dockerfile run."""

from hack.oci.recipe import Base, Requirements

_UNWANTED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
# What differs from one run to the next, and what only a machine of its own needs.
_CLEANING = 'cd "$1" && rm -rf var/log/*.log var/log/apt var/cache/ldconfig etc/machine-id etc/resolv.conf etc/hostname'
_WANTED = ("/usr/share/doc/*/copyright",)


def mmdebstrap(base: Base, *, suite: str, target: str) -> list[str]:
    """The command that makes a base's root file system."""
    return [
        "mmdebstrap",
        "--mode=root",
        f"--variant={base.variant}",
        f"--include={','.join(base.packages)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _UNWANTED),
        *(f"--dpkgopt=path-include={pattern}" for pattern in _WANTED),
        suite,
        target,
    ]


def setup(base: Base, *, target: str) -> list[str]:
    """The command that finishes a base's root file system; mmdebstrap's own hooks do not run when it only extracts."""
    return ["sh", "-euc", " && ".join([*base.setup, _CLEANING]), "setup", target]


def pip(requirements: Requirements, *, lock: str, target: str) -> list[str]:
    """The arguments of `pip` that install a base's Python packages: wheels for its Python, whichever runs pip."""
    version = requirements.python.replace(".", "")
    # manylinux names are minimums, and pip takes none for granted but those it is told; Debian 12 has glibc 2.36.
    platforms = [f"manylinux_2_{minor}_{{machine}}" for minor in (36, 35, 34, 31, 28, 26, 24, 17, 12, 5)]
    return [
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={requirements.python}",
        *(f"--abi={abi}" for abi in (f"cp{version}", "abi3", "none")),
        *(f"--platform={platform}" for platform in [*platforms, "manylinux2014_{machine}"]),
        f"--requirement={lock}",
        f"--target={target}",
    ]


def compileall(*directories: str) -> list[str]:
    """The command inside the image that compiles Python ahead: later nothing can be written."""
    return ["python3", "-m", "compileall", "-q", "-f", "-j", "1", "--invalidation-mode=unchecked-hash", *directories]
