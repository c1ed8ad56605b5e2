"""`python -m retool.rl key=value …`: reinforcement learning with tools.

`--help` lists the keys, `--check` stops after preflight.
"""

from __future__ import annotations

import asyncio
import os
import sys

from retool.config import help_text, read
from retool.config.redact import hide_in_tracebacks
from retool.metrics import warn_from_first_rank
from retool.rl.config import RLConfig
from retool.rl.preflight.keys import EXAMPLE, SYNONYMS


def main(words: list[str]) -> int:
    """Exit status: 0 done (or nothing wrong), 1 something is wrong and was said."""
    if "--help" in words or "-h" in words:
        print(help_text(RLConfig, "python -m retool.rl", EXAMPLE, SYNONYMS))
        return 0
    warn_from_first_rank(int(os.environ.get("RANK", 0)))
    hide_in_tracebacks()
    checking = "--check" in words
    from retool.rl.agent.tools.load import close_tools
    from retool.rl.preflight.checks import preflight
    from retool.rl.preflight.show import in_words
    from retool.run.start import start

    report = preflight(
        read(RLConfig, [w for w in words if w != "--check"], SYNONYMS), planning=checking
    )

    def run() -> None:
        from retool.rl.train import train

        train(report)

    return start(
        report,
        lambda: in_words(report),
        run,
        checking,
        lambda: asyncio.run(close_tools(report.tools)),
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
