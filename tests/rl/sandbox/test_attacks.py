"""Every attack of the suite, on the full sandbox and on what remains where namespaces are refused."""

from __future__ import annotations

import re

import pytest

from retool.rl.sandbox import Sandbox
from retool.rl.tools import result_text

from .attacks import ATTACKS, Attack
from .world import World


def test_the_suite_is_complete() -> None:
    assert len(ATTACKS) >= 40
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_attack(attack: Attack, sandbox: Sandbox, world: World) -> None:
    result = sandbox.run_blocking(world.fill(attack.program, sandbox), timeout=attack.timeout)
    text = result_text(result)
    assert "ESCAPED" not in result.stdout, f"{attack.name} ({attack.tries}) got through: {text}"
    assert result.status in attack.status, f"{result.status}: {text}"
    assert re.search(attack.cause, text, re.DOTALL), f"the cause isn't named: {text}"
    following = sandbox.run_blocking("import sympy\nprint(sympy.factorint(91))")
    assert (following.status, following.stdout) == ("success", "{7: 1, 13: 1}\n")
    world.assert_unchanged(sandbox)
