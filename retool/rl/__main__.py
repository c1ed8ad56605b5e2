"""`python -m retool.rl key=value …`: reinforcement learning with tools.

`--help` lists the keys (`--help rollout` some of them), `--check` stops after preflight.
"""

from __future__ import annotations

import os
import sys

from retool.config import help_text, read
from retool.config.command import calm_threads, exit_status, topics_of
from retool.config.redact import hide_in_tracebacks
from retool.metrics import warn_from_first_rank
from retool.rl.config import RLConfig
from retool.rl.config.names import EXAMPLE, IGNORED, SYNONYMS

PROGRAM = "python -m retool.rl"


def main(words: list[str], program: str = PROGRAM) -> int:
    """Exit status: 0 done (or nothing wrong), 1 something is wrong and was said."""
    if "--help" in words or "-h" in words:
        topics = topics_of(words)
        print(help_text(RLConfig, program, EXAMPLE, SYNONYMS, IGNORED, topics), end="")
        return 0
    calm_threads()
    rank = int(os.environ.get("RANK", 0))
    warn_from_first_rank(rank)
    hide_in_tracebacks()
    checking = "--check" in words
    # Heavy imports come late: `--help` doesn't wait for torch.
    from retool.preflight.show import show_plan
    from retool.rl.agent.tools.load import close_tools
    from retool.rl.agent.tools.state import run_alone
    from retool.rl.preflight.checks import preflight
    from retool.rl.preflight.show import in_words
    from retool.rl.train import train
    from retool.run.start import alone_in_folder, ended_well, verdict_of_all

    asked = [word for word in words if word != "--check"]
    parsed = read(RLConfig, asked, SYNONYMS, IGNORED)
    report = preflight(parsed, planning=checking)
    with alone_in_folder(report, checking) as report:
        # The store stays open until the run has a process group.
        faults, _store = verdict_of_all(report, checking)
        if not faults and rank == 0:
            show_plan(in_words(report), report.notes)
        if faults or checking:
            run_alone(close_tools(report.tools))  # which preflight started to try them
            return int(bool(faults))
        with ended_well() as ending:
            train(report)
    return ending.status


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
