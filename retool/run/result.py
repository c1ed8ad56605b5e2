"""What a run gives the program that asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retool.config import ConfigError, Fault


class Refused(ConfigError):
    """A run that wasn't started: `faults` lists everything that is wrong with it.

    Each fault says where it is, what is wrong, and the way out.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        count = len(self.faults)
        said = "\n".join(f"- {fault}" for fault in self.faults)
        self.args = (f"{count} fault{'s' if count != 1 else ''}, nothing started\n{said}",)


@dataclass(frozen=True)
class Result:
    """A run's folder, and what is in it.

    `model` is the Hugging Face folder of its last checkpoint (None: there is no checkpoint, or it was
    saved without one). `step` of `steps` are done and saved. `metrics` are the entries of
    metrics.jsonl, of optimizer steps and of validations, each with its `step`.
    """

    folder: Path
    model: Path | None
    step: int
    steps: int
    metrics: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def finished(self) -> bool:
        """Whether every step is done. If not, the same call continues from there."""
        return self.step >= self.steps

    @property
    def last(self) -> dict[str, Any]:
        """The last value of each metric."""
        values: dict[str, Any] = {}
        for entry in self.metrics:
            values |= entry
        return values
