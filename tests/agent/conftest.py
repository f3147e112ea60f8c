"""What the agent's tests stand on: real pods and a real capturer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.world import Capturer, Pod, make_pod


@pytest.fixture
def pod() -> Iterator[Pod]:
    with make_pod() as made:
        yield made


@pytest.fixture
def capturer(tmp_path: Path) -> Iterator[Capturer]:
    made = Capturer(tmp_path)
    yield made
    made.close()
