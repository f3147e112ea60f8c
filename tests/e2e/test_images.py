from pathlib import Path

from hack.oci.build import Builder
from hack.oci.recipe import Recipe
from hack.oci.store import Store


def test_an_image_built_twice_is_the_same_to_the_last_byte(tmp_path: Path) -> None:
    builds = [Builder(Recipe.load(), Store(tmp_path / place)).build(["agent"]) for place in ("one", "two")]
    assert builds[0] == builds[1]
