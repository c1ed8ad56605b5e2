"""`python -m retool.sft key=value …`: multi-turn SFT.

`--help` lists the keys (`--help data` some of them), `--check` stops after preflight.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from retool.config import help_text, read
from retool.config.command import calm_threads, exit_status, topics_of
from retool.config.redact import hide_in_tracebacks
from retool.metrics import warn_from_first_rank
from retool.sft.config import EXAMPLE, SYNONYMS, SFTConfig

PROGRAM = "python -m retool.sft"


def main(words: list[str], program: str = PROGRAM) -> int:
    """Exit status: 0 done (or nothing wrong), 1 something is wrong and was said."""
    if "--help" in words or "-h" in words:
        topics = topics_of(words)
        print(help_text(SFTConfig, program, EXAMPLE, SYNONYMS, topics=topics), end="")
        return 0
    calm_threads()
    rank = int(os.environ.get("RANK", 0))
    warn_from_first_rank(rank)
    hide_in_tracebacks()
    checking = "--check" in words
    # Heavy imports come late: `--help` doesn't wait for torch.
    from retool.preflight.show import show_plan
    from retool.run.start import alone_in_folder, ended_well, verdict_of_all
    from retool.sft.preflight import preflight
    from retool.sft.show import in_words, rows_read
    from retool.sft.train import train

    parsed = read(SFTConfig, [word for word in words if word != "--check"], SYNONYMS)
    with rows_read() if rank == 0 else nullcontext() as progress:
        report = preflight(parsed, planning=checking, progress=progress)
    with alone_in_folder(report, checking) as report:
        # The store stays open until the run has a process group.
        faults, _store = verdict_of_all(report, checking)
        if not faults and rank == 0:
            show_plan(in_words(report), report.notes)
        if faults or checking:
            return int(bool(faults))
        with ended_well() as ending:
            train(report)
    return ending.status


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
