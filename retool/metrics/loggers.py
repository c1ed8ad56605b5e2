"""All loggers of a run behind one interface. One that fails is reported and never ends the run."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from retool import __distribution__
from retool.config import Fault
from retool.config.redact import redact
from retool.metrics.console import ConsoleLogger, printable
from retool.metrics.jsonl import JsonlLogger
from retool.metrics.logger import Logger, Row, RunInfo
from retool.metrics.trackers import TRACKERS

LOGGERS: dict[str, Callable[[RunInfo], Logger]] = {
    "console": ConsoleLogger,
    "jsonl": JsonlLogger,
    **TRACKERS,
}
OnStep = Callable[[int, Mapping[str, float]], None]
EXTRAS = {name: name for name in TRACKERS}  # package of each
# That calls of one logger may take which then fail, all together. A client whose server is away
# tries for minutes, at every step anew.
MAX_FAILING_SECONDS = 60.0


class Loggers:
    """All loggers of a run behind the one interface. Another rank than 0 has none: `Loggers()`."""

    def __init__(
        self,
        loggers: Sequence[tuple[str, Logger]] = (),
        warn: Callable[[str], None] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """`on_step` is the program's own: what it raises ends the run."""
        self._loggers = dict(loggers)
        self._failed = set[str]()
        self._failing_seconds: dict[str, float] = defaultdict(float)
        self._printed_names: dict[str, str] = {}
        self._warn = warn or _warn
        self._on_step = on_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step's, or one validation's, metrics."""
        named = {self._without_secrets(name): value for name, value in metrics.items()}
        self._each(lambda logger: logger.log(step, named))
        if self._on_step is not None:
            self._on_step(step, named)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Log texts beside the metrics: rows of the same columns. metrics.jsonl has none."""
        if rows:
            told = [redact(row) for row in rows]
            self._each(lambda logger: logger.log_table(step, name, told))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _without_secrets(self, name: str) -> str:
        """A metric's name; a user's reward may make names of its own."""
        if name not in self._printed_names:
            self._printed_names[name] = redact(name)
        return self._printed_names[name]

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            begin = time.monotonic()
            try:
                call(logger)
            except Exception as error:  # whatever a third party's client raises
                self.failed(name, error)
                self._failing_seconds[name] += time.monotonic() - begin
                if self._failing_seconds[name] > MAX_FAILING_SECONDS:
                    self._leave_out(name)

    def failed(self, name: str, error: Exception) -> None:
        """Say once that a logger fails, and where its numbers still are."""
        if name in self._failed:
            return
        self._failed.add(name)
        reason = printable(f"{type(error).__name__}: {error}")
        self._warn(
            f"warning: the {name} logger fails ({reason}); the run goes on{self._comfort(name)}."
        )

    def _comfort(self, name: str) -> str:
        if name != "jsonl" and "jsonl" in self._loggers:
            return ", with all numbers in its folder's metrics.jsonl"
        if name == "jsonl" and name in self._loggers:
            return ", and writes what is missing once it can"
        return ""

    def _leave_out(self, name: str) -> None:
        seconds = self._failing_seconds[name]
        del self._loggers[name]
        self._warn(
            f"warning: the {name} logger has held the run up for {seconds:.0f} s with calls that "
            f"failed: it is left out from here on{self._comfort(name)}."
        )


def missing_extras(names: Sequence[str]) -> Iterator[Fault]:
    """A fault for each unknown logger and each whose package isn't installed."""
    for name in names:
        where = f"trainer.logger={name}"
        if name not in LOGGERS:
            yield Fault(where, "is not known.", f"Use any of {', '.join(LOGGERS)}.")
        elif name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
            yield Fault(
                where,
                f"needs the package {EXTRAS[name]}.",
                f"pip install '{__distribution__}[{name}]'",
            )


def open_loggers(names: Sequence[str], info: RunInfo, on_step: OnStep | None = None) -> Loggers:
    """Open the named loggers, and jsonl always.

    ValueError for a missing extra; one that fails to start is warned of.
    """
    faults = list(missing_extras(names))
    if faults:
        raise ValueError("\n".join(map(str, faults)))
    told = {"project": info.project, "experiment": info.experiment, "config": info.config}
    # Before a tracker sees it: what has been uploaded can't be taken back.
    info = replace(info, **redact(told))
    opened: list[tuple[str, Logger]] = []
    failures: list[tuple[str, Exception]] = []
    # jsonl first, asked for or not: it is what the report reads and a resume goes on with.
    for name in dict.fromkeys(["jsonl", *names]):
        try:
            opened.append((name, LOGGERS[name](info)))
        except Exception as error:  # no account, no network: not worth a training run
            failures.append((name, error))
    loggers = Loggers(opened, on_step=on_step)
    for name, error in failures:
        loggers.failed(name, error)
    return loggers


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
