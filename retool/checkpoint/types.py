"""What goes into a save, and what comes out of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import final

CONTENTS = ("model", "optimizer", "extra", "hf_model")


@dataclass(frozen=True)
class SaveOptions:
    """What a save writes and how.

    `contents` ⊆ model, optimizer, extra, hf_model. `keep` newest checkpoints stay (None: all).
    `remote_url` is an fsspec URL that finished checkpoints are copied to. `subfolder` holds the
    model files (`actor` in reinforcement learning).
    """

    contents: tuple[str, ...] = CONTENTS
    keep: int | None = None
    async_save: bool = False
    remote_url: str | None = None
    chat_template: str | None = None
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

    `error` is None, or what went wrong on which rank: then the previous checkpoint is still the
    latest.

    `stall_s` is how long the training loop waited, `seconds` how long everything took, `bytes` what
    this rank wrote.
    """

    step: int
    folder: Path
    error: str | None
    stall_s: float
    seconds: float
    bytes: int


@final
class PendingSave:
    """A save that may still be running."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: SaveResult | None = None

    def _finish(self, result: SaveResult) -> None:
        self._result = result
        self._done.set()

    def poll(self) -> SaveResult | None:
        """The result, or None while the files are being written."""
        return self._result if self._done.is_set() else None

    def wait(self) -> SaveResult:
        """Wait until everything is on disk, or has failed."""
        self._done.wait()
        assert self._result is not None
        return self._result
