"""Look before you train: every row of a dataset checked and counted, and a few shown token by
token, in colours, on the terminal.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from retool.data.audit.tally import KINDS, Shown, Tally, percentile, tally_chunk
from retool.data.read.files import RowFunction, columns_of, iter_chunks, resolve_files
from retool.data.read.rows import RowFormat
from retool.data.render.renderer import HISTORIES, Renderer
from retool.data.tokenise import TRUNCATIONS, map_chunks
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


@dataclass(frozen=True)
class Audit:
    """What was audited, and what was found."""

    files: tuple[str, ...]
    prompts: bool
    max_length: int
    truncation: str
    tally: Tally


def audit(
    files: str | Sequence[str],
    renderer: Renderer,
    *,
    max_length: int = 4096,
    truncation: str = "error",
    history: str = "error",
    multiturn: bool = True,
    messages_key: str = "messages",
    tools_key: str = "tools",
    enable_thinking_key: str = "enable_thinking",
    prompt_key: str = "prompt",
    response_key: str = "response",
    rows_function: RowFunction | None = None,
    max_samples: int = -1,
    num_workers: int = 2,
    show: int = 3,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Audit all rows; `show` of them, chosen by a hash of file and row, are kept with their tokens.

    A file that has prompts (`prompt_key`) and no messages or responses holds RL prompts. Raises
    ValueError for files that can't be read at all; a bad row is a counted refusal.
    """
    for value, known, key in (
        (truncation, TRUNCATIONS, "truncation"),
        (history, HISTORIES, "multiturn.history"),
    ):
        if value not in known:
            raise ValueError(f"data.{key}={value} is unknown: use {', '.join(known)}.")
    found = resolve_files(files, any_suffix=rows_function is not None)
    form = RowFormat(
        multiturn, messages_key, tools_key, enable_thinking_key, prompt_key, response_key
    )
    prompts = False
    if rows_function is None:
        columns = columns_of(found[0])
        prompts = (
            messages_key not in columns and prompt_key in columns and response_key not in columns
        )
        if prompts:
            form = RowFormat(True, prompt_key, tools_key, enable_thinking_key)
        for file in found:
            form.check(file)
    task = partial(
        tally_chunk,
        renderer=renderer,
        form=form,
        prompts=prompts,
        max_length=max_length,
        truncation=truncation,
        history=history,
        show=show,
    )
    total = Tally()
    for part in map_chunks(
        task, iter_chunks(found, form.columns, rows_function, max_samples), num_workers
    ):
        total.add(part, show)
        if progress is not None:
            progress(total.rows)
    return Audit(tuple(found), prompts, max_length, truncation, total)


def count_rows(files: Sequence[str]) -> int | None:
    """Rows of parquet files, from their footers; None where only reading would tell."""
    rows = 0
    for file in files:
        if not file.endswith(".parquet"):
            return None
        fs, path = url_to_fs(file)
        with fs.open(path, "rb") as stream:
            rows += pq.ParquetFile(stream).metadata.num_rows
    return rows


class RowProgress:
    """A progress bar on a terminal, a line every 10,000 rows elsewhere, on standard error."""

    def __init__(self, total: int | None) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("auditing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = (
            Progress(*columns, console=console, transient=True) if console.is_terminal else None
        )
        self._task = self._bar.add_task("", total=total) if self._bar is not None else None
        self._said = 0

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
        elif rows // 10_000 > self._said:
            self._said = rows // 10_000
            print(f"{rows:,} rows audited", file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Text without control characters, line by line: a dataset must not steer the terminal."""
    return "\n".join(printable(line) for line in text.split("\n"))


def summary(audit: Audit) -> list[tuple[str, str]]:
    """The table of the first screen: (what, how much)."""
    tally = audit.tally
    lengths = " · ".join(
        f"{name} {percentile(tally.lengths, q):,}"
        for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
    )
    lines = [
        ("files", f"{len(audit.files)}"),
        ("rows", f"{tally.rows:,}{' RL prompts' if audit.prompts else ''}"),
        ("refused", f"{tally.refused:,}"),
        (
            "samples",
            f"{tally.samples:,}"
            + (f" ({tally.split:,} rows split by history)" if tally.split else ""),
        ),
        (f"longer than {audit.max_length:,}", _long(audit)),
        ("tokens", f"{tally.tokens:,}"),
        ("length", lengths),
        ("roles", _counts(tally.roles)),
        ("assistant turns a row", _spread(tally.turns)),
        (
            "tool calls",
            f"{sum(tally.calls.values()):,}"
            + (f" ({_counts(tally.calls, 5)})" if tally.calls else ""),
        ),
    ]
    if not audit.prompts:
        share = tally.trained_tokens / max(tally.tokens, 1)
        spread = (
            f"p5 {percentile(tally.shares, 0.05)} % · p50 {percentile(tally.shares, 0.5)} % · p95 "
            f"{percentile(tally.shares, 0.95)} %"
        )
        lines.insert(
            6, ("trained", f"{tally.trained_tokens:,} tokens, {share:.1%} (by sample: {spread})")
        )
        lines.insert(5, ("without a trained token", f"{tally.dropped_untrained:,} dropped"))
    notes = (
        (
            "other tokens in one pass",
            tally.piecewise_differs,
            "samples: pieces are tokenised as inference does",
        ),
        (
            "control tokens in texts",
            tally.control_text,
            "rows: what is only said of them is tokenised as text",
        ),
        (
            "reasoning left out",
            tally.dropped_thoughts,
            "turns are trained without what they think (data.drop_reasoning)",
        ),
        (
            "empty assistant turns",
            tally.empty_turns,
            "turns without text or call: only their end is trained",
        ),
    )
    said = [(what, f"{count:,} {why}") for what, count, why in notes if count]
    if tally.unread:
        said.append(("fields that nothing shows", _counts(tally.unread)))
    if tally.undeclared:
        said.append(
            (
                "calls of undeclared tools",
                f"{sum(tally.undeclared.values()):,} ({_counts(tally.undeclared, 5)})",
            )
        )
    return lines + said


def _long(audit: Audit) -> str:
    tally = audit.tally
    became = {"drop": (tally.dropped_long, "dropped"), "error": (tally.refused_long, "refused")}
    count, what = became.get(audit.truncation, (tally.truncated, f"cut on the {audit.truncation}"))
    return f"{count:,} {what} (data.truncation={audit.truncation})" if count else "none"


def _counts(counter: Counter[str], most: int = 8) -> str:
    shown = [f"{printable(name)[:40]} {count:,}" for name, count in counter.most_common(most)]
    return " · ".join([*shown, *(["…"] if len(counter) > most else [])]) or "none"


def _spread(histogram: Counter[int]) -> str:
    return (
        f"min {min(histogram, default=0)} · p50 {percentile(histogram, 0.5)} · max "
        f"{max(histogram, default=0)}"
    )


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
