"""The suite's table: what each attack comes to in each mode.

`python -m tests.sandbox.table [NAME …]`; without names, all of them.

A cell is `held`, or `OPEN` where the program got what it wanted. An attack on a guarantee that a
mode doesn't have is expected to get through there, and `strict` refuses to start; anything else
that isn't as the suite has it ends the command with 1 and is told below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.conftest import Arena, open_folder
from tests.sandbox.modes import library, modes_here
from tests.sandbox.trial import Outcome, attempt
from tests.sandbox.world import World


def lines(
    attacks: Sequence[Attack], outcomes: Sequence[Sequence[Outcome]], arenas: Sequence[Arena]
) -> list[str]:
    """The table as Markdown."""
    head = "| attack | what it tries | " + " | ".join(arena.mode.name for arena in arenas) + " |"
    rule = "|---|---|" + "---|" * len(arenas)
    found = [head, rule]
    for attack, row in zip(attacks, outcomes, strict=True):
        cells = " | ".join("held" if outcome.kind == "held" else "**OPEN**" for outcome in row)
        found.append(f"| {attack.name} | {attack.tries} | {cells} |")
    return found


def main(names: Sequence[str]) -> int:
    attacks = [attack for attack in ATTACKS if not names or attack.name in names]
    os.environ["WANDB_API_KEY"] = os.environ["HF_TOKEN"] = (
        "retool-canary-token"  # for programs not to find
    )
    wrong = []
    with ExitStack() as stack:
        arenas = []
        for mode in modes_here():
            world = World.open(open_folder(), mode.uid, library(mode.python))
            stack.callback(world.close)
            arenas.append(Arena(mode, stack.enter_context(mode.start()), world))
        outcomes = []
        with ThreadPoolExecutor(len(arenas)) as threads:
            for attack in attacks:
                row = list(threads.map(lambda arena, attack=attack: attempt(attack, arena), arenas))
                wrong += [
                    f"{arena.mode.name}: {one.wrong}"
                    for arena, one in zip(arenas, row, strict=True)
                    if one.wrong
                ]
                outcomes.append(row)
        print("\n".join(lines(attacks, outcomes, arenas)))
    print("\n".join(f"\n{text}" for text in wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
