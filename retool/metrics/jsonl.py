"""`metrics.jsonl`: one JSON object per optimizer step and one per validation, each with its `step`.

Non-finite numbers, which JSON lacks, stand as null. A run resumed at step s keeps the entries up to
s and goes on from there, so that no step is missing or repeated whatever the earlier process had
still logged, a torn last line included.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retool.config.redact import logger
from retool.files.durable import replacing
from retool.metrics.logger import Row, RunInfo

log = logger("retool.metrics")


class JsonlLogger:
    """`metrics.jsonl`.

    A line that couldn't be written (a full disk) is kept and written with the next one.
    """

    def __init__(self, info: RunInfo) -> None:
        info.folder.mkdir(parents=True, exist_ok=True)
        self._path = info.folder / "metrics.jsonl"
        self._pending = b""  # lines that aren't in the file yet
        resume_jsonl(self._path, info.first_step)
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._end = os.lseek(self._file, 0, os.SEEK_END)

    def _follow(self, step: int) -> None:
        """Go on in a new file where somebody removed or replaced ours: what is written into a file
        without a name is lost.
        """
        same = False
        with contextlib.suppress(FileNotFoundError):
            same = self._file >= 0 and os.path.samestat(os.stat(self._path), os.fstat(self._file))
        if not same:
            self._drop()
            self._open()
            log.warning(
                "%s was removed or replaced while the run wrote it: it goes on from step %d in a new one.",
                self._path,
                step,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entry: dict[str, float | int | None] = {"step": step}
        for name, value in metrics.items():
            entry[name] = _finite(value)
        self._pending += json.dumps(entry, allow_nan=False).encode() + b"\n"
        self._follow(step)
        try:
            written = os.pwrite(self._file, self._pending, self._end)
            if written < len(self._pending):
                raise OSError(f"metrics.jsonl: only {written} of {len(self._pending)} bytes fitted")
        except OSError:
            os.ftruncate(self._file, self._end)  # no torn line in the middle
            raise
        self._end += written
        self._pending = b""

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Texts stand in the run's `report/`."""

    def close(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)
            self._drop()

    def _drop(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def resume_jsonl(path: Path, step: int) -> None:
    """Keep the entries of `path` up to `step`; a torn line and everything later go. Atomic.

    At step 0 an older run's file is moved to `metrics.N.jsonl`, not emptied.
    """
    if not path.exists():
        return
    if step == 0:
        if path.stat().st_size:
            path.rename(_free_name(path))
        return
    with path.open("rb") as old, replacing(path) as new:
        for line in old:
            entry = _parse_line(line)
            if entry is not None and entry["step"] <= step:
                new.write(line)


def _free_name(path: Path) -> Path:
    """The first of metrics.1.jsonl, metrics.2.jsonl, … that isn't there."""
    names = (path.with_name(f"metrics.{number}.jsonl") for number in range(1, 10**6))
    return next(name for name in names if not name.exists())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, a torn last line left out."""
    with path.open("rb") as lines:
        entries = [_parse_line(line) for line in lines]
    return [entry for entry in entries if entry is not None]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _finite(value: float) -> float | int | None:
    number = value if isinstance(value, (int, float)) else float(value)
    return number if math.isfinite(number) else None
