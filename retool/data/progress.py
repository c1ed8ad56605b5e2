"""Progress of reading many rows where no bar can be drawn: in a pipe, a log, a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 10.0


class ProgressLines:
    """Says every ten seconds how many rows are done, and how many that is a second.

    `say` is given the line, without its end. `what` is what is done to rows. `total`: how many there
    are, where it is known.
    """

    def __init__(self, say: Callable[[str], object], what: str, total: int | None = None) -> None:
        self.say = say
        self.what = what
        self.total = total
        self._began = time.monotonic()
        self._said = self._began

    def __call__(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        of_all = f" of {self.total:,}" if self.total is not None else ""
        self.say(f"{rows:,}{of_all} rows {self.what}, {rows / (now - self._began):,.0f} a second")
