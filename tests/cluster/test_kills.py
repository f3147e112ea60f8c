"""Whichever program of a node is killed under traffic, every packet is in a file or told of.

A round for each; `hack/soak` plays a hundred of them, at twice the rate.
"""

import random
from pathlib import Path

import pytest

from hack.benchmarks import engines
from hack.clusters.bare import BareControlPlane
from tests.faults.scenario import Victim, scenario

RATE = 50_000


@pytest.mark.parametrize("victim", Victim)
async def test_a_kill_loses_nothing_that_is_not_told(
    victim: Victim, guarded_plane: BareControlPlane, tmp_path: Path
) -> None:
    engines.require()
    async with scenario(guarded_plane, tmp_path) as made:
        outcome = await made.play(victim, chance=random.Random(victim), rate=RATE)  # noqa: S311
    assert outcome.complaints() == [], outcome
