"""Building what is stale: a layer is made once for what goes into it, and images that share a base share its layers."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from hack.clusters.binaries import find
from hack.clusters.cluster import cache
from hack.clusters.failure import Failure
from hack.oci import rootfs
from hack.oci.layer import pack
from hack.oci.recipe import PROJECT, Base, Image, Recipe, Requirements
from hack.oci.store import Descriptor, Store

PACKAGES = ("mmdebstrap",)
_PAUSE = Image(
    name="pause",
    base=Base(
        name="scratch",
        variant="",
        packages=(),
        setup=(),
        compile=None,
        requirements=None,
        environment={},
        user="65535:65535",
        directory="/",
    ),
    copy=(),
    command=("/pause",),
)


class Builder:
    """Builds the images of a recipe into a store."""

    def __init__(self, recipe: Recipe, store: Store, *, project: Path = PROJECT) -> None:
        self._recipe = recipe
        self._store = store
        self._project = project

    def build(self, names: Iterable[str] = ()) -> dict[str, Descriptor]:
        """The manifests of the images named (all of them by default), by full name. Failure says which log to read."""
        chosen = list(names) or list(self._recipe.images)
        if unknown := [name for name in chosen if name not in self._recipe.images]:
            raise Failure(f"no image {unknown[0]!r}; there are {', '.join(self._recipe.images)}")
        with self._store.locked():
            built = {self._recipe.reference(name): self._image(self._recipe.images[name]) for name in chosen}
            self._store.prune()
        return built

    def _image(self, image: Image) -> Descriptor:
        layers = [self._base_layer(image.base)]
        if image.base.requirements:
            layers.append(self._requirements_layer(image.base, image.base.requirements))
        if image.copy:
            layers.append(self._copy_layer(image))
        return self._store.image(image, layers)

    def _base_layer(self, base: Base) -> Descriptor:
        return self._store.layer(self._base_key(base), lambda output: self._write_base(base, output))

    def _write_base(self, base: Base, output: IO[bytes]) -> None:
        pack(self._root(base), ["."], output)

    def _root(self, base: Base) -> Path:
        """The base's root file system as a directory, in which what comes on top is compiled."""
        root = self._store.directory / f"rootfs-{base.name}-{self._base_key(base)}"
        if not root.exists():
            subprocess.run([PROJECT / "hack" / "packages", *PACKAGES], check=True)
            start = time.monotonic()
            draft = root.with_suffix(".new")
            shutil.rmtree(draft, ignore_errors=True)
            command = rootfs.mmdebstrap(base, suite=self._recipe.suite, target=str(draft))
            self._run(command, what=f"the base {base.name}")
            self._run(rootfs.setup(base, target=str(draft)), what=f"the base {base.name}")
            if base.compile:
                self._run(["chroot", draft, *rootfs.compileall(base.compile)], what=f"the Python of {base.name}")
            draft.rename(root)
            _say(f"base {base.name}", start)
        os.utime(root)
        return root

    def _requirements_layer(self, base: Base, requirements: Requirements) -> Descriptor:
        lock = self._project / requirements.lock
        key = _key(self._base_key(base), repr(requirements), lock.read_bytes())

        def write(output: IO[bytes]) -> None:
            start = time.monotonic()
            place = self._root(base) / requirements.directory.lstrip("/")
            shutil.rmtree(place, ignore_errors=True)
            machine = platform.machine()
            options = rootfs.pip(requirements, lock=str(lock), target=str(place))
            pip = [sys.executable, "-m", "pip", *(option.format(machine=machine) for option in options)]
            self._run(pip, what=f"the Python packages of {base.name}")
            shutil.rmtree(place / "bin", ignore_errors=True)
            self._pack_compiled(base, [requirements.directory], output)
            _say(f"Python packages of base {base.name}", start)

        return self._store.layer(key, write)

    def _copy_layer(self, image: Image) -> Descriptor:
        files = [file for directory in image.copy for file in _sources(self._project / directory)]
        names = [str(file.relative_to(self._project)) for file in files]
        content = [part for name, file in zip(names, files, strict=True) for part in (name, file.read_bytes())]
        key = _key(self._base_key(image.base), repr(image.copy), *content)

        def write(output: IO[bytes]) -> None:
            start = time.monotonic()
            place = f"{image.base.directory}/"
            for name, file in zip(names, files, strict=True):
                target = self._root(image.base) / place.lstrip("/") / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                target.chmod(0o644)
            self._pack_compiled(image.base, [place + directory for directory in image.copy], output)
            _say(f"image {image.name}", start)

        return self._store.layer(key, write)

    def _pack_compiled(self, base: Base, directories: Sequence[str], output: IO[bytes]) -> None:
        """Compile what lies in these directories of the base's root, write it as a layer and remove it again."""
        root = self._root(base)
        self._run(["chroot", root, *rootfs.compileall(*directories)], what=f"the Python in {', '.join(directories)}")
        inside = [directory.lstrip("/") for directory in directories]
        pack(root, inside, output)
        for directory in inside:
            shutil.rmtree(root / directory)

    def _base_key(self, base: Base) -> str:
        making = rootfs.mmdebstrap(base, suite=self._recipe.suite, target="")
        return _key(repr([making, rootfs.setup(base, target=""), rootfs.compileall(base.compile or "")]))

    def _run(self, command: Sequence[str | Path], *, what: str) -> None:
        log = self._store.directory / "build.log"
        environment = os.environ | {"SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            environment.pop(name, None)
        with log.open("wb") as output:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise Failure(f"could not make {what}", log=log)


def builder() -> Builder:
    """The builder of this checkout's images, into the cache that all checkouts share."""
    return Builder(Recipe.load(), store())


def store() -> Store:
    return Store(cache() / "images")


def pause() -> Mapping[str, Descriptor]:
    """The image that holds every pod's namespaces: one static program."""
    program = find("pause")
    images = store()
    with images.locked():
        layer = images.layer(
            _key("pause", program.read_bytes()), lambda output: pack(program.parent, [program.name], output)
        )
        return {Recipe.load().reference("pause"): images.image(_PAUSE, [layer])}


def _sources(directory: Path) -> list[Path]:
    files = [path for path in sorted(directory.rglob("*.py")) if path.is_file()]
    if not files:
        raise Failure(f"{directory} holds no Python; hack/images.toml names it")
    return files


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:20]


def _say(what: str, start: float) -> None:
    print(f"{time.monotonic() - start:6.1f} s  {what}", flush=True)
