"""The Dockerfile of those who have Docker: the same commands in the same order, written from the same recipe."""

import json
import shlex
from collections.abc import Iterator, Sequence

from hack.oci import rootfs
from hack.oci.recipe import Base, Image, Recipe

_HEAD = """\
# syntax=docker/dockerfile:1
# Written by `hack/images dockerfile` from hack/images.toml: change that. A test compares them.
# docker build --target agent --tag kubepcap.invalid/agent:dev .
"""


def dockerfile(recipe: Recipe) -> str:
    """The text of the Dockerfile: a stage to build each base, the base itself, and a stage for each image."""
    lines = [_HEAD]
    for base in recipe.bases.values():
        lines += _base(base, suite=recipe.suite)
    for image in recipe.images.values():
        lines += _image(image)
    return "\n".join(lines)


def _base(base: Base, *, suite: str) -> Iterator[str]:
    root = "/rootfs"
    packages = ["mmdebstrap", *(["python3-pip"] if base.requirements else [])]
    yield f"FROM debian:{suite}-slim AS build-{base.name}"
    yield f"RUN apt-get update && apt-get install --yes --no-install-recommends {' '.join(packages)}"
    yield f"RUN {_wrapped(rootfs.mmdebstrap(base, suite=suite, target=root))}"
    yield "RUN " + shlex.join(rootfs.setup(base, target=root)).replace(" && ", " && \\\n    ")
    if base.compile:
        yield f"RUN {shlex.join(['chroot', root, *rootfs.compileall(base.compile)])}"
    if base.requirements:
        yield f"COPY {base.requirements.lock} /requirements.txt"
        target = root + base.requirements.directory
        options = rootfs.pip(base.requirements, lock="/requirements.txt", target=target)
        command = _wrapped(["pip", *options]).replace("'", '"').replace("{machine}", "$(uname -m)")
        yield f"RUN {command} && rm -rf {target}/bin"
        yield f"RUN {shlex.join(['chroot', root, *rootfs.compileall(base.requirements.directory)])}"
    yield ""
    yield f"FROM scratch AS base-{base.name}"
    yield f"COPY --from=build-{base.name} {root} /"
    yield from (f"ENV {name}={value}" for name, value in sorted(base.environment.items()))
    yield f"WORKDIR {base.directory}"
    yield ""


def _image(image: Image) -> Iterator[str]:
    yield f"FROM base-{image.base.name} AS {image.name}"
    yield from (f"COPY {directory} {image.base.directory}/{directory}" for directory in image.copy)
    if image.copy:
        directories = [f"{image.base.directory}/{directory}" for directory in image.copy]
        yield f"RUN {json.dumps(rootfs.compileall(*directories))}"
    yield f"USER {image.base.user}"
    yield f"CMD {json.dumps(list(image.command))}"
    yield ""


def _wrapped(command: Sequence[str]) -> str:
    return " \\\n    ".join(shlex.quote(word) for word in command)
