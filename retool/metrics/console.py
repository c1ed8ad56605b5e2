"""A line a step: on a terminal the headline with a progress bar, elsewhere everything, to be parsed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from retool.metrics.logger import Row, RunInfo

HEADLINE = (  # what a terminal line shows, in order: (metric, label, format)
    ("train/loss", "loss", ".4f"),
    ("val/loss", "val loss", ".4f"),
    ("train/grad_norm", "grad", ".3f"),
    ("train/lr", "lr", ".2e"),
    ("perf/tokens_per_second_per_gpu", "tok/s/gpu", ",.0f"),
    ("train/mfu", "mfu", ".1%"),
    ("perf/max_memory_allocated_gb", "GiB", ".1f"),
    ("timing_s/step", "s/step", ".2f"),
    ("critic/score/mean", "score", ".3f"),
    ("response_length/mean", "length", ".0f"),
    ("num_turns/mean", "turns", ".1f"),
    ("tool/latency", "s/tool", ".2f"),
)
PHASES_SHOWN = 5
TEXT = 200  # characters shown of a text, its last


class Display(Progress):
    """A progress bar with a line below it."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="dim", no_wrap=True, overflow="ellipsis")


class ConsoleLogger:
    """A line a step. On a terminal also a bar with the time left, and the last step's phases; elsewhere `key=value` lines to parse."""

    def __init__(self, info: RunInfo, console: Console | None = None) -> None:
        self._console = console or Console(markup=False, highlight=False, soft_wrap=True)
        self._info, self._bar = info, None
        self._first: tuple[int, float] | None = None  # the first step logged and when: what came before it (compiling) isn't the pace
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("eta"), TimeRemainingColumn())  # fmt: skip
            self._bar = Display(*columns, console=self._console)
            self._task = self._bar.add_task(printable(info.experiment), total=info.total_steps or None, completed=info.first_step)
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._bar is None:
            self._console.print(self._plain(step, metrics))
            return
        shown = (f"{label} {format(metrics[name], form)}" for name, label, form in HEADLINE if name in metrics)
        self._bar.note = phases(metrics) or self._bar.note
        self._bar.update(self._task, completed=step)
        self._console.print(f"step {step}/{self._info.total_steps}  " + "  ".join(shown))

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        for row in rows:
            self._console.print(f"{name}, step {step}: " + " → ".join(printable(str(value)[-TEXT:]) for value in row.values()))

    def _plain(self, step: int, metrics: Mapping[str, float]) -> str:
        words = [f"step={step}/{self._info.total_steps}", *(f"{name}={value:.6g}" for name, value in metrics.items())]
        now, left = time.monotonic(), self._info.total_steps - step
        first, then = self._first = self._first or (step, now)
        if left == 0 or (step > first and left > 0):
            words.append(f"eta_s={left and (now - then) / (step - first) * left:.0f}")
        return " ".join(words)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def phases(metrics: Mapping[str, float]) -> str:
    """Where a step's time went, the longest phases first; empty where nothing was timed."""
    whole = metrics.get("timing_s/step", 0.0)
    named = {name.removeprefix("timing_s/"): value for name, value in metrics.items() if name.startswith("timing_s/") and value > 0}
    longest = sorted((name for name in named if name != "step"), key=lambda name: -named[name])[:PHASES_SHOWN]
    return f"last step {whole:.2f} s: " + " · ".join(f"{name} {named[name]:.2f}" for name in longest) if whole > 0 and longest else ""


def printable(text: str) -> str:
    """`text` on one line without control characters, so that it can't steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
