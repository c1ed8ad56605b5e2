"""One attack in one mode: what came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from retool.rl.agent.tools import result_text
from retool.sandbox import Result
from tests.sandbox.attacks import Attack
from tests.sandbox.conftest import Arena

HELD = "held"
OPEN = "open"


@dataclass(frozen=True)
class Outcome:
    """`kind` is HELD, or OPEN where the program got what it wanted; `wrong` says what isn't as the
    attack's entry has it.
    """

    kind: str
    wrong: str = ""


def attempt(attack: Attack, arena: Arena) -> Outcome:
    """Run it, and look at the host and at the next call.

    The world is mended where it was harmed.
    """
    sandbox = arena.sandbox
    world = arena.world
    expected = attack.guarantee not in sandbox.unmet if attack.guarantee else True
    result = sandbox.run_blocking(
        world.fill(attack.program, sandbox), timeout=attack.timeout, memory_mb=attack.memory_mb
    )
    wrong = harm(arena)
    got_through = "ESCAPED" in result.stdout or bool(wrong)
    if got_through == expected:
        told = wrong or result_text(result)
        wrong = (
            f"{attack.name} ({attack.tries}) got through: {told}"
            if got_through
            else f"{attack.name} was held, where nothing should: {told}"
        )
    elif not got_through:
        wrong = unlike(attack, result)
    else:
        wrong = ""
    following = sandbox.run_blocking("import sympy\nprint(sympy.factorint(91))")
    if (following.status, following.stdout) != ("success", "{7: 1, 13: 1}\n"):
        wrong += f" The next call: {following}"
    return Outcome(OPEN if got_through else HELD, wrong)


def harm(arena: Arena) -> str:
    """What changed on the host."""
    try:
        arena.world.assert_unchanged(arena.sandbox)
    except AssertionError as error:
        arena.world.mend()
        return str(error).split("\nassert")[0]
    return ""


def unlike(attack: Attack, result: Result) -> str:
    """How the result doesn't read as it should."""
    text = result_text(result)
    if result.status not in attack.status:
        return f"{result.status}: {text}"
    if not re.search(attack.cause, text, re.DOTALL):
        return f"the cause isn't named: {text}"
    return ""
