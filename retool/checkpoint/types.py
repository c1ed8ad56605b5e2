"""What goes into a save, and what comes out of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

CONTENTS = ("model", "optimizer", "extra", "hf_model")


@dataclass(frozen=True)
class TrainingState:
    """The state of training, without the tensors of the model and its optimizer.

    Both mappings hold tensors, strings, numbers, lists and dicts only. `extra` is each rank's own.
    Of `data_state` (order and position of the data) rank 0's counts.
    """

    step: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    data_state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveOptions:
    """What a save writes and how.

    contents       some of model, optimizer, extra, hf_model
    keep           how many of the newest checkpoints stay; None: all
    async_save     write in the background, once everything is in host memory
    remote_url     where finished checkpoints are copied to (any URL that fsspec knows)
    chat_template  takes the place of the model's own in the export
    turn_ends      token ids at which who samples from the export stops, besides the model's own
    subfolder      holds the model files: `actor` in reinforcement learning
    """

    contents: tuple[str, ...] = CONTENTS
    keep: int | None = None
    async_save: bool = False
    remote_url: str | None = None
    chat_template: str | None = None
    turn_ends: tuple[int, ...] = ()
    subfolder: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self.contents) - set(CONTENTS):
            raise ValueError(
                f"checkpoint.save_contents: {', '.join(sorted(unknown))} is unknown. Use any of "
                f"{', '.join(CONTENTS)}."
            )


@dataclass(frozen=True)
class SaveResult:
    """How a save ended.

    error    None, or what went wrong on which rank: the previous checkpoint is still the latest
    stall_s  seconds that the training loop waited
    seconds  seconds that everything took
    bytes    what this rank wrote
    """

    step: int
    folder: Path
    error: str | None
    stall_s: float
    seconds: float
    bytes: int


@final
class PendingSave:
    """A save that may still be running. Its clock starts when it is made."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder
        self._begin = time.perf_counter()
        self._stall_s: float | None = None
        self._done = threading.Event()
        self._result: SaveResult | None = None

    def let_training_go_on(self) -> None:
        """Training need not wait any longer: the rest happens in the background."""
        self._stall_s = time.perf_counter() - self._begin

    def finish(self, error: str | None, bytes_written: int) -> None:
        """The save has ended, well or with an error: whoever waits for it goes on."""
        seconds = time.perf_counter() - self._begin
        stall_s = seconds if self._stall_s is None else self._stall_s
        self._result = SaveResult(self.step, self.folder, error, stall_s, seconds, bytes_written)
        self._done.set()

    def poll(self) -> SaveResult | None:
        """The result, or None while the files are being written."""
        return self._result if self._done.is_set() else None

    def wait(self) -> SaveResult:
        """Wait until everything is on disk, or has failed."""
        self._done.wait()
        assert self._result is not None
        return self._result
