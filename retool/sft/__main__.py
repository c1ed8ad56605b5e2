"""`python -m retool.sft key=value …`: multi-turn SFT. `--help` lists the keys, `--check` stops after preflight."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from retool.config import help_text, read
from retool.metrics import warn_from_first_rank
from retool.sft.config import EXAMPLE, SYNONYMS, SFTConfig


def main(words: list[str]) -> int:
    """Exit status: 0 done (or nothing wrong), 1 something is wrong and was said."""
    if "--help" in words or "-h" in words:
        print(help_text(SFTConfig, "python -m retool.sft", EXAMPLE, SYNONYMS))
        return 0
    rank = int(os.environ.get("RANK", 0))
    warn_from_first_rank(rank)
    checking = "--check" in words
    from retool.sft.preflight import preflight
    from retool.sft.show import rows_read, show

    with rows_read() if rank == 0 else nullcontext() as progress:
        report = preflight(read(SFTConfig, [w for w in words if w != "--check"], SYNONYMS), planning=checking, progress=progress)
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0  # what only this machine lacks must be said here
    if rank == 0 or (report.faults and first_here):
        show(report)
    if report.faults or checking:
        return int(bool(report.faults))
    from retool.run import exit_status
    from retool.sft.train import train

    return exit_status(lambda: train(report), rank)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
