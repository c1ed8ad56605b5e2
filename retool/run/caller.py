"""Who asked for a run: a command, whose process is the run's, or a program that goes on after it."""

from __future__ import annotations

from dataclasses import dataclass

from retool.metrics.loggers import OnStep


@dataclass(frozen=True)
class Caller:
    """`owns_process`: the process ends with the run. It dies with its launcher then, and parts from
    the other processes for good. `on_step` is called with (step, metrics) on rank 0, for every
    entry of metrics.jsonl. `quiet`: nothing is printed but what isn't as usual.
    """

    owns_process: bool = True
    on_step: OnStep | None = None
    quiet: bool = False


COMMAND = Caller()
