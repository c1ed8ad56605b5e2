"""`python -m retool.sft key=value …`: multi-turn SFT.

`--help` lists the keys, `--check` stops after preflight.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from retool.config import help_text, read
from retool.config.redact import hide_in_tracebacks
from retool.metrics import warn_from_first_rank
from retool.sft.config import EXAMPLE, SYNONYMS, SFTConfig


def main(words: list[str]) -> int:
    """Exit status: 0 done (or nothing wrong), 1 something is wrong and was said."""
    if "--help" in words or "-h" in words:
        print(help_text(SFTConfig, "python -m retool.sft", EXAMPLE, SYNONYMS))
        return 0
    rank = int(os.environ.get("RANK", 0))
    warn_from_first_rank(rank)
    hide_in_tracebacks()
    checking = "--check" in words
    from retool.run.start import start
    from retool.sft.preflight import preflight
    from retool.sft.show import in_words, rows_read

    with rows_read() if rank == 0 else nullcontext() as progress:
        report = preflight(
            read(SFTConfig, [w for w in words if w != "--check"], SYNONYMS),
            planning=checking,
            progress=progress,
        )

    def run() -> None:
        from retool.sft.train import train

        train(report)

    return start(report, lambda: in_words(report), run, checking)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
