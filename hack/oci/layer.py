"""Layers: tar archives that hold the same bytes whenever they hold the same files."""

import os
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def pack(root: Path, paths: Iterable[str], output: IO[bytes]) -> None:
    """Write the trees `paths` (relative to `root`; "." is all of it) as a layer: sorted and without times.

    Owners and modes are those on disk. Device files and sockets are left out: a container runtime makes its own /dev.
    """
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        inodes: dict[tuple[int, int], str] = {}
        for path in paths:
            for entry in _walk(root / path):
                _add(archive, entry, name=os.path.relpath(entry, root), inodes=inodes)


def _walk(path: Path) -> Iterable[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            yield from _walk(entry)


def _add(archive: tarfile.TarFile, path: Path, *, name: str, inodes: dict[tuple[int, int], str]) -> None:
    status = path.lstat()
    mode = status.st_mode
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid, info.mtime = stat.S_IMODE(mode), status.st_uid, status.st_gid, 0
    if stat.S_ISDIR(mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif not stat.S_ISREG(mode):
        return
    elif (first := inodes.setdefault((status.st_dev, status.st_ino), name)) != name:
        info.type, info.linkname = tarfile.LNKTYPE, first
    else:
        info.size = status.st_size
        with path.open("rb") as content:
            archive.addfile(info, content)
        return
    archive.addfile(info)
