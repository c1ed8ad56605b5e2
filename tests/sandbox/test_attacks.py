"""Every attack of the suite, in every mode of isolation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.conftest import Arena
from tests.sandbox.trial import attempt


def test_the_suite_is_complete() -> None:
    assert len(ATTACKS) >= 40
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_attack(attack: Attack, arenas: list[Arena]) -> None:
    with ThreadPoolExecutor(len(arenas)) as threads:
        outcomes = list(threads.map(lambda arena: attempt(attack, arena), arenas))
    wrong = {
        arena.mode.name: outcome.wrong
        for arena, outcome in zip(arenas, outcomes, strict=True)
        if outcome.wrong
    }
    assert not wrong
