"""Where a run's numbers go.

One small interface (`logger`), and all loggers of a run behind it (`loggers`): metrics.jsonl, which
is always on (`jsonl`), lines for people (`console`), and other people's packages (`trackers`).
`transcripts` are trajectories for people.
"""

from __future__ import annotations

import logging
import warnings

from retool.metrics.console import ConsoleLogger, phases, printable
from retool.metrics.jsonl import JsonlLogger, read_jsonl
from retool.metrics.logger import Logger, RunInfo
from retool.metrics.loggers import EXTRAS, LOGGERS, Loggers, missing_extras, open_loggers

__all__ = [
    "EXTRAS",
    "LOGGERS",
    "ConsoleLogger",
    "JsonlLogger",
    "Logger",
    "Loggers",
    "RunInfo",
    "missing_extras",
    "open_loggers",
    "phases",
    "printable",
    "read_jsonl",
    "warn_from_first_rank",
]


def warn_from_first_rank(rank: int) -> None:
    """Python's warnings and libraries' log lines below errors come from rank 0 alone: every rank
    has the same to say.
    """
    if rank > 0:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
