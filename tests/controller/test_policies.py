"""The policies that are shipped in a ConfigMap."""

from pathlib import Path

import pytest

from api.capturepolicy import CapturePolicy
from controller.policies import read

BASELINE = Path(__file__).parents[2] / "manifests" / "baseline.yaml"


def test_the_baseline_is_read() -> None:
    shipped = read({"data": {"baseline.yaml": BASELINE.read_text()}})
    assert list(shipped) == ["baseline"]
    baseline = CapturePolicy.model_validate(shipped["baseline"])
    assert not baseline.spec.selectors.allow_empty


def test_a_configmap_without_policies_ships_none() -> None:
    assert read({}) == {}


@pytest.mark.parametrize("text", ["{", "[]", "spec: {}", "metadata: {name: p}\nspec: {limits: {maxFiles: 0}}"])
def test_what_is_no_policy_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"^team\.yaml: "):
        read({"data": {"baseline.yaml": BASELINE.read_text(), "team.yaml": text}})
