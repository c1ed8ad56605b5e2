"""What a place for metrics is, and what it is told at start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Row = Mapping[str, str | float]


class Logger(Protocol):
    """A place for metrics, and for tables of texts whose rows have the same columns.

    Each of the three may raise: `Loggers` keeps the run going.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told at start.

    `first_step` is the step the run resumes after (0 = fresh), `total_steps` the last one.
    """

    folder: Path
    project: str
    experiment: str
    config: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0
    total_steps: int = 0
