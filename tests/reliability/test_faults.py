"""Two hundred runs, each with one fault; a few of them by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.campaign import draw, play, prepare
from tests.reliability.faults import FAULTS
from tests.sft.conftest import work

__all__ = ["work"]


def _play_all(work: Path, root: Path, runs: int, seed: int) -> None:
    stage = prepare(work, root)
    outcomes = [
        play(stage, number, fault, seed * 1_000_003 + number)
        for number, fault in enumerate(draw(runs, seed))
    ]
    assert len(outcomes) == runs
    assert not [f"{outcome.fault}: {outcome.broken}" for outcome in outcomes if outcome.broken]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_runs_with_a_fault_each(work: Path, tmp_path: Path) -> None:
    _play_all(work, tmp_path, runs=200, seed=1)


def test_every_fault_is_drawn_and_has_a_name_of_its_own() -> None:
    drawn = draw(2 * len(FAULTS), seed=3)
    assert {fault.name for fault in drawn[: len(FAULTS)]} == {
        fault.name for fault in FAULTS
    } and len({f.name for f in FAULTS}) == len(FAULTS)
