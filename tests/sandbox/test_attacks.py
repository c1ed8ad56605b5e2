"""Every attack of the suite: by default where all layers hold it and where the fewest do, and in
every mode of isolation among the slow tests.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.conftest import Arena
from tests.sandbox.trial import attempt


def test_the_suite_is_complete() -> None:
    assert len(ATTACKS) >= 40
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


each_attack = pytest.mark.parametrize(
    "attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-")
)


@each_attack
def test_attack(attack: Attack, outermost_arenas: list[Arena]) -> None:
    assert not got_through(attack, outermost_arenas)


@pytest.mark.slow
@each_attack
def test_attack_in_every_mode(attack: Attack, arenas: list[Arena]) -> None:
    assert not got_through(attack, arenas)


def got_through(attack: Attack, arenas: list[Arena]) -> dict[str, str]:
    """What isn't as the attack's entry has it, by the mode's name."""
    with ThreadPoolExecutor(len(arenas)) as threads:
        outcomes = list(threads.map(lambda arena: attempt(attack, arena), arenas))
    return {
        arena.mode.name: outcome.wrong
        for arena, outcome in zip(arenas, outcomes, strict=True)
        if outcome.wrong
    }
