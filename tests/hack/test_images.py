import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from hack.clusters.failure import Failure
from hack.oci.build import Builder
from hack.oci.dockerfile import dockerfile
from hack.oci.recipe import PROJECT, Recipe
from hack.oci.store import Store


def test_the_dockerfile_is_the_one_that_the_recipe_gives() -> None:
    assert (PROJECT / "Dockerfile").read_text() == dockerfile(Recipe.load()), "run: hack/images dockerfile > Dockerfile"


def test_docker_may_see_everything_that_the_dockerfile_copies() -> None:
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    seen = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {f"{directory}/**/*.py" for image in Recipe.load().images.values() for directory in image.copy}
    locks = {base.requirements.lock for image in Recipe.load().images.values() if (base := image.base).requirements}
    assert copied | locks == seen


def test_no_program_runs_as_root_or_carries_another_program() -> None:
    recipe = Recipe.load()
    programs = {"apiserver", "webhook", "controller", "agent"}
    for name in programs:
        image = recipe.images[name]
        assert image.base.user == "65532:65532"
        assert programs & set(image.copy) == {name}


def writer(content: str) -> Callable[[IO[bytes]], None]:
    def write(output: IO[bytes]) -> None:
        output.write(content.encode())

    return write


def test_images_of_one_base_share_its_layers_in_an_archive(tmp_path: Path) -> None:
    recipe, store = Recipe.load(), Store(tmp_path)
    shared, *own = (store.layer(name, writer(name)) for name in ("shared", "a", "b"))
    image = recipe.images["agent"]
    images = {
        f"example.invalid/{name}:dev": store.image(image, [shared, layer])
        for name, layer in zip("ab", own, strict=True)
    }
    output = io.BytesIO()
    store.export(images, output)
    with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as archive:
        names = archive.getnames()
        index = archive.extractfile("index.json")
        assert index is not None
        manifests = json.load(index)["manifests"]
    assert len(names) == len(set(names)) == 2 + 2 * 2 + 3
    assert {manifest["annotations"]["io.containerd.image.name"] for manifest in manifests} == set(images)


def test_a_layer_is_made_once_for_its_key(tmp_path: Path) -> None:
    made = []

    def make(output: IO[bytes]) -> None:
        made.append(output)

    store = Store(tmp_path)
    assert store.layer("key", make) == Store(tmp_path).layer("key", make)
    assert len(made) == 1


def test_a_layer_whose_making_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: IO[bytes]) -> None:
        raise Failure("no network")

    with pytest.raises(Failure):
        Store(tmp_path).layer("key", fail)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_image_that_the_recipe_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no image 'gui'; there are apiserver"):
        Builder(Recipe.load(), Store(tmp_path)).build(["gui"])


def test_an_unknown_key_of_the_recipe_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "images.toml"
    path.write_text((PROJECT / "hack" / "images.toml").read_text() + '\nentrypoint = ["sh"]\n')
    with pytest.raises(TypeError, match="entrypoint"):
        Recipe.load(path)
