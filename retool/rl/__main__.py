"""`python -m retool.rl key=value …`: reinforcement learning with tools. `--help` lists the keys, `--check` stops after preflight."""

from __future__ import annotations

import asyncio
import os
import sys

from retool.config import help_text, read
from retool.rl.config import RLConfig
from retool.rl.keys import EXAMPLE, SYNONYMS


def main(words: list[str]) -> int:
    """Exit status: 0 done (or nothing wrong), 1 something is wrong and was said."""
    if "--help" in words or "-h" in words:
        print(help_text(RLConfig, "python -m retool.rl", EXAMPLE, SYNONYMS))
        return 0
    checking = "--check" in words
    from retool.rl.preflight import preflight
    from retool.rl.show import show

    report = preflight(read(RLConfig, [w for w in words if w != "--check"], SYNONYMS), planning=checking)
    if int(os.environ.get("RANK", 0)) == 0:
        show(report)
    if report.faults or checking:
        asyncio.run(_close(report.tools))
        return int(bool(report.faults))
    from retool.rl.train import train
    from retool.run import exit_status

    return exit_status(lambda: train(report), int(os.environ.get("RANK", 0)))


async def _close(tools: object) -> None:
    for tool in tools:  # pyright: ignore[reportGeneralTypeIssues]
        await tool.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
