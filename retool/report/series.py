"""A run's metrics by step, thinned so that a page can hold them, whatever metrics.jsonl holds and
however long it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from retool.files.untrusted import read_lines, shown
from retool.metrics.collapse import Signs

LINE_BYTES = 1 << 20  # of metrics.jsonl; real lines have one or two thousand
MOST_STEPS = 10_000  # points of one curve
MOST_VALUES = 500_000  # of all curves of a run: some 5 MB of the page
MOST_NAMES = 1000
NAME_CHARACTERS = 200
STEP_LIMIT = 1 << 53  # what a browser counts exactly


class Series:
    """Values by step and name.

    `stride` steps share a row where there are more than a page can hold: each name's last value
    counts.
    """

    def __init__(self, most_values: int = MOST_VALUES) -> None:
        self.stride = 1
        self.left_out = 0  # lines, and names, that are no metrics
        self.signs = Signs()  # of all steps, before they share rows
        self._most_values = most_values
        self._rows: dict[int, dict[str, Any]] = {}  # step // stride → name → value
        self._steps: dict[int, int] = {}  # step // stride → the last step in it
        self._names: dict[str, None] = {}

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        self.signs.see(step, metrics)
        place = step // self.stride
        row = self._rows.setdefault(place, {})
        self._steps[place] = max(step, self._steps.get(place, 0))
        for name, value in metrics.items():
            if name != "step" and is_number(value) and self._knows(name):
                row[name] = value
        while len(self._rows) > 1 and self._too_many():
            self._halve()

    def _too_many(self) -> bool:
        rows = len(self._rows)
        # On the page each name has a place for each step, used or not
        return rows > MOST_STEPS or rows * len(self._names) > self._most_values

    def _knows(self, name: str) -> bool:
        if name in self._names:
            return True
        if len(self._names) >= MOST_NAMES or len(name) > NAME_CHARACTERS or name != shown(name):
            self.left_out += 1
            return False
        self._names[name] = None
        return True

    def _halve(self) -> None:
        """Put two rows into one, everywhere."""
        self.stride *= 2
        rows: dict[int, dict[str, Any]] = {}
        steps: dict[int, int] = {}
        for place in sorted(self._rows):
            rows.setdefault(place // 2, {}).update(self._rows[place])
            steps[place // 2] = self._steps[place]
        self._rows = rows
        self._steps = steps

    def columns(self) -> tuple[list[int], dict[str, list[float | None]]]:
        """(steps, name → a value for each of them, None where it has none)."""
        places = sorted(self._rows)
        columns = {
            name: [_six_digits(self._rows[place].get(name)) for place in places]
            for name in self._names
        }
        return [self._steps[place] for place in places], columns


def read_series(path: Path, most_values: int = MOST_VALUES) -> Series:
    """The metrics in a metrics.jsonl, one line in memory at a time.

    A torn last line is left out; others without metrics are counted.
    """
    series = Series(most_values)
    for line in read_lines(path, LINE_BYTES):
        if line is not None and not line.endswith(b"\n"):
            break  # being written, or torn
        entry = _parsed(line)
        if entry is None:
            series.left_out += 1
        else:
            series.add(entry["step"], entry)
    return series


def _parsed(line: bytes | None) -> dict[str, Any] | None:
    try:
        entry = json.loads(line or b"")
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    if type(step) is not int or not 0 <= step < STEP_LIMIT:  # not isinstance: true is no step
        return None
    return entry


def is_number(value: Any) -> bool:
    """What JSON has for a number, or for one that isn't finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _six_digits(value: Any) -> float | None:
    if value is None or not abs(value) <= sys.float_info.max:
        return None
    return float(f"{value:.6g}")
