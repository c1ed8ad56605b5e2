"""A preflight report for people: one table of faults, or the plan in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from retool.preflight.memory import Choice
from retool.preflight.show import memory_words, model_words, written_words
from retool.sft.config import SFTConfig
from retool.sft.plan import Report, fills


@contextmanager
def rows_read(console: Console | None = None) -> Iterator[Callable[[int], None] | None]:
    """What to tell of rows as they are read: on a terminal a line that counts and goes away,
    elsewhere nothing.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,} rows rendered and tokenised"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda count: bar.update(task, completed=count)


def in_words(report: Report) -> Iterator[tuple[str, str]]:
    """(topic, text) of what the run will do."""
    world = report.world
    choice = report.choice
    sp = report.config.ulysses_sequence_parallel_size
    assert choice is not None
    yield "model", model_words(report)
    yield (
        "processes",
        (
            f"{world.processes} on {world.nodes} machine(s): {world.processes // sp} data-parallel × {sp} "
            "sequence-parallel"
        ),
    )
    yield "data", _data_words(report)
    yield "a step", _step_words(report, choice, world.processes // sp)
    yield "schedule", _schedule_words(report.config, report.steps)
    yield "memory", memory_words(report)
    yield "written", written_words(report)


def _data_words(report: Report) -> str:
    batch = report.config.data.train_batch_size
    lines = list[str]()
    if report.train is not None:
        left = len(report.train.dataset) % batch
        lines.append(f"training: {report.train.said.sentence()}")
        lines.append(
            f"{report.steps_per_epoch:,} steps of {batch} an epoch"
            + (f", its last {left} samples left out" if left else "")
        )
    lines.append(f"validation: {report.val.said.sentence()}" if report.val else "no validation")
    return "\n".join(lines)


def _step_words(report: Report, choice: Choice, dp: int) -> str:
    config = report.config
    data = config.data
    sp = config.ulysses_sequence_parallel_size
    share = -(-data.train_batch_size // dp)
    spread = (
        f"{data.train_batch_size} samples, {share} for each of {dp} groups"
        if dp > 1
        else f"{data.train_batch_size} samples"
    )
    if data.micro_batch_size_per_gpu is not None and not fills(config):
        count = -(-share // data.micro_batch_size_per_gpu)
        micro = (
            f"{count} micro-batches of {data.micro_batch_size_per_gpu} samples, at most "
            f"{choice.tokens:,} tokens per GPU"
        )
    else:
        chosen = "" if data.max_token_len_per_gpu is not None else " (chosen)"
        if data.micro_batch_size_per_gpu is not None:
            chosen = f" (room for the {data.micro_batch_size_per_gpu} longest)"
        micro = (
            f"micro-batches of at most {choice.tokens:,} tokens per GPU{chosen}, {choice.tokens * sp:,} "
            "per group"
        )
    tokens = ""
    if report.train is not None:
        lengths = report.train.dataset.lengths
        trained = report.train.dataset.trained
        size = data.train_batch_size
        tokens = (
            f"; {size * float(lengths.mean()):,.0f} tokens on average, "
            f"{size * float(trained.mean()):,.0f} of them trained"
        )
    padding = (
        "packed without padding"
        if config.use_remove_padding
        else f"each sample padded to {data.max_length:,}"
    )
    return f"{spread}{tokens}; {micro}; {padding}"


def _schedule_words(config: SFTConfig, steps: int) -> str:
    optim = config.optim
    after = (
        "constant"
        if optim.lr_scheduler == "constant"
        else f"{optim.lr_scheduler} to {optim.lr * optim.min_lr_ratio:g}"
    )
    warmup = f"warm-up over {int(steps * optim.warmup_steps_ratio):,} to {optim.lr:g}"
    return f"{steps:,} optimizer steps; {warmup}, then {after}; gradient norm clipped at {optim.clip_grad:g}"
