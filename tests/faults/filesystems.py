"""File systems that fail as real ones do, made of what every Linux has: tmpfs, loop devices, remounting."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1 << 20


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def tmpfs(directory: Path, *, size: int) -> Iterator[Path]:
    """A small file system in memory, mounted on `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0770", "none", directory)
    try:
        yield directory
    finally:
        run("umount", "--lazy", directory)


@dataclass(frozen=True)
class Disk:
    """A mounted ext4 on a loop device."""

    directory: Path

    def fill(self) -> Path:
        """Let somebody else take all that is free; returns their file."""
        return fill(self.directory)

    def remount(self, how: str) -> None:
        """`ro` or `rw`."""
        run("mount", "-o", f"remount,{how}", self.directory)


def fill(directory: Path) -> Path:
    """Write a file until the disk is full."""
    hog = directory / "hog"
    with hog.open("wb", buffering=0) as file:
        size = MEGABYTE
        while size:
            try:
                file.write(b"\1" * size)
            except OSError:
                size //= 2
    return hog


@contextmanager
def ext4(directory: Path, image: Path, *, size: int = 64 * MEGABYTE) -> Iterator[Disk]:
    """A disk of its own, mounted on `directory`. Without a journal, so that an error stays with who met it."""
    directory.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    options = "lazy_itable_init=0,nodiscard"
    run("mkfs.ext4", "-q", "-E", options, "-O", "^has_journal", "-m", "0", image)
    device = run("losetup", "--find", "--show", image).strip()
    try:
        run("mount", "-o", "errors=continue", device, directory)
        try:
            yield Disk(directory)
        finally:
            run("umount", "--lazy", directory)
    finally:
        run("losetup", "--detach", device)
