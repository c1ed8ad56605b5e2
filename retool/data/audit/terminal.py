"""An audit on the terminal: its progress, its summary, refused rows, and samples in colours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from retool.data.audit.audit import Audit
from retool.data.audit.counts import Tally
from retool.data.audit.samples import KINDS, Shown
from retool.data.audit.summary import summary
from retool.data.progress import ProgressLines
from retool.metrics import printable

STYLES = {
    "trained": "bold green",
    "context": "",
    "tool": "cyan",
    "template": "dim",
    "masked": "yellow",
}
MEANINGS = {
    "trained": "trained",
    "context": "user and system",
    "tool": "tool result",
    "template": "template",
    "masked": "assistant, not trained",
}
SHOWN_REFUSALS = 10


class RowProgress:
    """A progress bar on a terminal, a line every ten seconds elsewhere, on standard error."""

    def __init__(self, total: int | None) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("auditing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = (
            Progress(*columns, console=console, transient=True) if console.is_terminal else None
        )
        self._task = self._bar.add_task("", total=total) if self._bar is not None else None
        self._lines = ProgressLines(partial(console.print, soft_wrap=True), "audited", total)

    def __enter__(self) -> Callable[[int], None]:
        if self._bar is not None:
            self._bar.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _update(self, rows: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=rows)
        else:
            self._lines(rows)


def clean(text: str) -> str:
    """Text without control characters, line by line: a dataset must not steer the terminal."""
    return "\n".join(printable(line) for line in text.split("\n"))


def coloured(sample: Shown, brackets: bool = False) -> Text:
    """The sample's text, coloured by what becomes of each token; a trained newline is drawn.

    `brackets` puts ⟦ ⟧ around what is trained, for where there are no colours.
    """
    text = Text()
    for name, run in groupby(sample.tokens, key=lambda token: KINDS[token[1]]):
        shown = clean("".join(part for part, _ in run))
        if name == "trained":
            shown = shown.replace("\n", "↵\n")
            shown = f"⟦{shown}⟧" if brackets else shown
        text.append(shown, style=STYLES[name])
    return text


def show_audit(audit: Audit, console: Console, samples: int = 3) -> None:
    """The report on a terminal: summary, refused rows with their reasons, `samples` samples.

    Data is shown as text, never as markup.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, much in summary(audit):
        bad = what == "refused" and audit.tally.refused > 0
        table.add_row(Text(what, style="bold"), Text(much, style="bold red" if bad else ""))
    console.print(Panel(table, title=Text(", ".join(map(_name, audit.files))[:100]), expand=False))
    if audit.tally.refused:
        console.print(_refusals(audit.tally))
    brackets = console.color_system is None
    if audit.tally.shown[:samples]:
        legend = [Text(f"{MEANINGS[name]}   ", style=STYLES[name]) for name in KINDS]
        console.print(Text.assemble("Samples: ", *(["⟦trained⟧"] if brackets else legend)))
    for sample in audit.tally.shown[:samples]:
        facts = (
            f"{sample.length:,} tokens, {sample.trained:,} trained, {sample.turns} turns, "
            f"{sample.calls} tool calls"
        )
        console.print(Rule(Text(f"{_name(sample.file)}, row {sample.row}: {facts}"), align="left"))
        console.print(coloured(sample, brackets))


def _name(file: str) -> str:
    return printable(file.rpartition("/")[2])


def _refusals(tally: Tally) -> Group:
    kinds = Table("rows", "why refused", box=None, padding=(0, 2, 0, 0), header_style="bold red")
    for why, count in tally.reasons.most_common(SHOWN_REFUSALS):
        kinds.add_row(Text(f"{count:,}"), Text(printable(why)))
    rows = [Text(printable(why)) for why in tally.refusals[:SHOWN_REFUSALS]]
    more = tally.refused - len(rows)
    return Group(kinds, Text(""), *rows, *([Text(f"… and {more:,} more.")] if more > 0 else []))
