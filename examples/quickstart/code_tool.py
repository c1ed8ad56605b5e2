"""The demo's `code_interpreter`: runs a program in the embedded sandbox and gives back what the
model reads.
"""

from __future__ import annotations

import functools
import sys

from retool.rl.agent.tools import result_text
from retool.sandbox import Limits, Sandbox

SECONDS = 5
MEMORY_MB = 512
WORKERS = 2
LIMITS = Limits(wall_seconds=SECONDS, cpu_seconds=2 * SECONDS, memory_mb=MEMORY_MB, output_kb=1)


@functools.cache
def sandbox() -> Sandbox:
    """This process's sandbox, started by the first call.

    Where a guarantee has no mechanism it says so and goes on with the others.
    """
    try:
        return Sandbox(LIMITS, WORKERS)
    except ValueError as error:
        print(
            (
                f"{error}\nThe demo runs its own model's programs only, so it goes on with "
                "isolation=best_effort."
            ),
            file=sys.stderr,
        )
        return Sandbox(LIMITS, WORKERS, "best_effort")


def isolation() -> str:
    """What a tool's configuration must ask for on this machine: `strict` where that can start, else
    `best_effort`.
    """
    return "best_effort" if sandbox().unmet else "strict"


def run_code(code: str) -> str:
    """Run `code`; what it printed, cut, then what went wrong if anything did.

    Never raises for what the program does.
    """
    return result_text(sandbox().run_blocking(code))
