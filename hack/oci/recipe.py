"""What `hack/images.toml` says: the images and what they stand on."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

PROJECT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True, slots=True)
class Requirements:
    """Python packages of a base: a lock file with hashes, the Python they are for and the directory they go to."""

    lock: str
    python: str
    directory: str


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """A root file system made of Debian packages. `setup` are shell commands that get its directory as $1."""

    name: str
    variant: str
    packages: tuple[str, ...]
    setup: tuple[str, ...]
    compile: str | None
    requirements: Requirements | None
    environment: Mapping[str, str]
    user: str
    directory: str


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An image: a base and the directories of the project that are copied into it."""

    name: str
    base: Base
    copy: tuple[str, ...]
    command: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    registry: str
    tag: str
    suite: str
    bases: Mapping[str, Base]
    images: Mapping[str, Image]

    def reference(self, image: str) -> str:
        """The full name of an image, as manifests write it."""
        return f"{self.registry}/{image}:{self.tag}"

    @classmethod
    def load(cls, path: Path = PROJECT / "hack" / "images.toml") -> Self:
        """Parse the recipe; a key that is missing or unknown is a TypeError or a KeyError."""
        data = tomllib.loads(path.read_text())
        bases = {name: _base(name, dict(value)) for name, value in data.pop("bases").items()}
        images = {name: _image(name, bases, dict(value)) for name, value in data.pop("images").items()}
        return cls(bases=bases, images=images, **data)


def _base(name: str, value: dict[str, Any]) -> Base:
    requirements = None
    if lock := value.pop("requirements", None):
        requirements = Requirements(
            lock=lock, python=value.pop("requirements_python"), directory=value.pop("requirements_directory")
        )
    return Base(
        name=name,
        packages=tuple(value.pop("packages")),
        setup=tuple(value.pop("setup")),
        compile=value.pop("compile", None),
        requirements=requirements,
        **value,
    )


def _image(name: str, bases: Mapping[str, Base], value: dict[str, Any]) -> Image:
    return Image(
        name=name,
        base=bases[value.pop("base")],
        copy=tuple(value.pop("copy")),
        command=tuple(value.pop("command")),
        **value,
    )
