"""The CRDs in manifests/ are those of the models."""

import pytest
import yaml

from hack.generate_crds import DEFINITIONS, DIRECTORY, Definition


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.plural)
def test_the_crd_in_manifests_is_generated_from_the_model(definition: Definition) -> None:
    file = DIRECTORY / f"{definition.plural}.yaml"
    assert file.read_text() == definition.to_yaml(), "run `hack/run python -m hack.generate_crds`"


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.plural)
def test_every_field_is_described(definition: Definition) -> None:
    schema = yaml.safe_load(definition.to_yaml())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    def undescribed(fields: dict, path: str) -> list[str]:  # type: ignore[type-arg]
        found = []
        for name, field in fields.items():
            if "description" not in field:
                found.append(f"{path}.{name}")
            inner = field.get("items", field)
            found += undescribed(inner.get("properties", {}), f"{path}.{name}")
        return found

    assert (
        undescribed(schema["properties"]["spec" if "spec" in schema["properties"] else "status"]["properties"], "")
        == []
    )
