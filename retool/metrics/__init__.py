"""Where a run's numbers go.

One small interface; `metrics.jsonl` is always on; a failing logger warns once and never ends a run.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from retool.config import Fault
from retool.config.redact import redact
from retool.metrics.console import ConsoleLogger, phases, printable
from retool.metrics.jsonl import JsonlLogger, read_jsonl
from retool.metrics.logger import Logger, Row, RunInfo
from retool.metrics.trackers import TRACKERS

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
LOGGERS: dict[str, Callable[[RunInfo], Logger]] = {
    "console": ConsoleLogger,
    "jsonl": JsonlLogger,
    **TRACKERS,
}
EXTRAS = {name: name for name in TRACKERS}  # package of each


class Loggers:
    """All loggers of a run behind the one interface. Another rank than 0 has none: `Loggers()`."""

    def __init__(
        self, loggers: Sequence[tuple[str, Logger]] = (), warn: Callable[[str], None] | None = None
    ) -> None:
        self._loggers = tuple(loggers)
        self._failed = set[str]()
        self._names: dict[str, str] = {}
        self._warn = warn or _warn

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step's, or one validation's, metrics."""
        named = {self._name(name): value for name, value in metrics.items()}
        self._each(lambda logger: logger.log(step, named))

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Log texts beside the metrics: rows of the same columns. metrics.jsonl has none."""
        if rows:
            told = [redact(row) for row in rows]
            self._each(lambda logger: logger.log_table(step, name, told))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _name(self, name: str) -> str:
        """A metric's name without secrets: a user's reward may make names of its own."""
        if name not in self._names:
            self._names[name] = redact(name)
        return self._names[name]

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in self._loggers:
            try:
                call(logger)
            except Exception as error:  # whatever a third party's client raises
                self.failed(name, error)

    def failed(self, name: str, error: Exception) -> None:
        """Say once that a logger fails."""
        if name not in self._failed:
            self._failed.add(name)
            self._warn(
                f"warning: the {name} logger fails ({type(error).__name__}: "
                f"{printable(str(error))}); the run goes on."
            )


def missing_extras(names: Sequence[str]) -> Iterator[Fault]:
    """A fault for each unknown logger and each whose package isn't installed."""
    for name in names:
        if name not in LOGGERS:
            yield Fault(
                f"trainer.logger={name}", "is not known.", f"Use any of {', '.join(LOGGERS)}."
            )
        elif name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
            yield Fault(
                f"trainer.logger={name}",
                f"needs the package {EXTRAS[name]}.",
                f"pip install 'retool[{name}]'",
            )


def open_loggers(names: Sequence[str], info: RunInfo) -> Loggers:
    """Open the named loggers, and jsonl always.

    ValueError for a missing extra; one that fails to start is warned of.
    """
    faults = list(missing_extras(names))
    if faults:
        raise ValueError("\n".join(map(str, faults)))
    info = replace(
        info,
        **redact({"project": info.project, "experiment": info.experiment, "config": info.config}),
    )
    opened: list[tuple[str, Logger]] = []
    trouble: list[tuple[str, Exception]] = []
    for name in dict.fromkeys(["jsonl", *names]):
        try:
            opened.append((name, LOGGERS[name](info)))
        except Exception as error:  # no account, no network: not worth a training run
            trouble.append((name, error))
    loggers = Loggers(opened)
    for name, error in trouble:
        loggers.failed(name, error)
    return loggers


def warn_from_first_rank(rank: int) -> None:
    """Python's warnings and libraries' log lines below errors come from rank 0 alone: every rank
    has the same to say.
    """
    if rank > 0:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
