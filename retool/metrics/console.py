"""For people: a short line a step and one for each validated source.

Everything, to be parsed, is in metrics.jsonl.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from retool.config.redact import redact
from retool.metrics.logger import Row, RunInfo

HEADLINE = (  # what a step's line shows, in order: (metric, label, format)
    ("train/loss", "loss", ".4f"),
    ("val/loss", "val loss", ".4f"),
    ("critic/score/mean", "score", ".3f"),
    ("critic/acc/mean", "acc", ".3f"),
    ("response_length/mean", "length", ".0f"),
    ("num_turns/mean", "turns", ".1f"),
    ("tool/latency", "s/tool", ".2f"),
    ("actor/entropy", "entropy", ".3f"),
    ("actor/ppo_kl", "kl", ".1e"),
    ("train/grad_norm", "grad", ".3f"),
    ("actor/grad_norm", "grad", ".3f"),
    ("train/lr", "lr", ".2e"),
    ("actor/lr", "lr", ".2e"),
    ("perf/tokens_per_second_per_gpu", "tok/s/gpu", ",.0f"),
    ("perf/throughput", "tok/s/gpu", ",.0f"),
    ("train/mfu", "mfu", ".1%"),
    ("perf/mfu/actor", "mfu", ".1%"),
    ("perf/max_memory_allocated_gb", "GiB", ".1f"),
    ("timing_s/step", "s/step", ".2f"),
)
TROUBLES = (  # shown where there are any: (metric, label)
    ("train/skipped_steps", "skipped"),
    ("actor/skipped_updates", "skipped"),
    ("reward/exceptions", "reward failed"),
    ("reward/timeouts", "reward timed out"),
    ("reward/killed", "reward killed"),
    ("tool/timeouts", "tool timeouts"),
    ("stop/infrastructure", "lost to infrastructure"),
    ("stop/aborted", "aborted"),
)
VALIDATED = re.compile(r"val-core/(?P<source>.+)/(?P<what>\w+)/(?P<kind>\w+@\d+)(?:/mean)?")
PHASES_SHOWN = 5
LONG = 1e9  # from here on a number is shown by its exponent
TEXT_CHARACTERS = 200  # shown of a text, its last


class Display(Progress):
    """A progress bar with a line below it."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="dim", no_wrap=True, overflow="ellipsis")


class ConsoleLogger:
    """A line a step, and one for each source of a validation. On a terminal also a bar with the
    time left, and the last step's phases; elsewhere the time left stands in the line.
    """

    def __init__(self, info: RunInfo, console: Console | None = None) -> None:
        # A notebook gets plain lines: rich would make a block of each
        self._console = console or Console(
            markup=False, highlight=False, soft_wrap=True, force_jupyter=False
        )
        self._info = info
        self._bar = None
        # The first step logged, and when: what came before it (compiling) isn't the pace
        self._first: tuple[int, float] | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self._bar = Display(*columns, console=self._console)
            self._task = self._bar.add_task(
                printable(info.experiment),
                total=info.total_steps or None,
                completed=info.first_step,
            )
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        place = f"step {step}/{self._info.total_steps}"
        for line in validation_lines(metrics):
            self._console.print(f"{place}  {line}")
        words = headline(metrics)
        if self._bar is not None:
            self._bar.note = phases(metrics) or self._bar.note
            self._bar.update(self._task, completed=step)
        elif words:
            words += self._time_left(step)
        if words:
            self._console.print("  ".join([place, *words]))

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        for row in rows:
            texts = [printable(str(value)[-TEXT_CHARACTERS:]) for value in row.values()]
            self._console.print(f"{name}, step {step}: {' → '.join(texts)}")

    def _time_left(self, step: int) -> list[str]:
        """At the pace since the first step that was logged; nothing where that isn't known yet, or
        nothing is left.
        """
        now = time.monotonic()
        left = self._info.total_steps - step
        first, then = self._first = self._first or (step, now)
        if step <= first or left <= 0:
            return []
        seconds = (now - then) / (step - first) * left
        return [f"eta {timedelta(seconds=round(seconds))}"]

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def headline(metrics: Mapping[str, float]) -> list[str]:
    """The few numbers of a step that people look at, and what went wrong in it, if anything did."""
    shown = [
        f"{label} {number(metrics[name], form)}"
        for name, label, form in HEADLINE
        if name in metrics
    ]
    return shown + [f"{label} {metrics[name]:g}" for name, label in TROUBLES if metrics.get(name)]


def number(value: float, form: str) -> str:
    """`value` in this format; one that would be too long to read so, such as a reward of 1e300, in
    scientific notation.
    """
    return format(value, ".3e" if LONG <= abs(value) < math.inf else form)


def validation_lines(metrics: Mapping[str, float]) -> Iterator[str]:
    """The core statistics of a validation, a line for each source of questions."""
    by_source: dict[str, list[str]] = {}
    for name, value in metrics.items():
        core = VALIDATED.fullmatch(name)
        if core is not None:
            words = by_source.setdefault(f"{core['source']} {core['what']}", [])
            words.append(f"{core['kind']} {number(value, '.3f')}")
    for source, words in by_source.items():
        yield printable("  ".join([f"val {source}", *words]))


def phases(metrics: Mapping[str, float]) -> str:
    """Where a step's time went, the longest phases first; empty where nothing was timed."""
    whole = metrics.get("timing_s/step", 0.0)
    seconds = {
        name.removeprefix("timing_s/"): value
        for name, value in metrics.items()
        if name.startswith("timing_s/") and name != "timing_s/step" and value > 0
    }
    if whole <= 0 or not seconds:
        return ""
    longest = sorted(seconds, key=lambda name: -seconds[name])[:PHASES_SHOWN]
    shown = " · ".join(f"{name} {seconds[name]:.2f}" for name in longest)
    return f"last step {whole:.2f} s: {shown}"


def printable(text: str) -> str:
    """`text` on one line without secrets, and without control characters, so that it can't steer a
    terminal.
    """
    return "".join(c if c.isprintable() else " " for c in redact(text))
