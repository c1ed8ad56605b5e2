"""A preflight report for people: one table of faults, or the plan in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from retool.data.loader import StepOrder, divided_share
from retool.data.progress import ProgressLines
from retool.preflight.plan import Choice
from retool.preflight.show import (
    expert_words,
    memory_words,
    model_words,
    traffic_words,
    written_words,
)
from retool.sft.config import SFTConfig
from retool.sft.plan import SFTReport, fills, packing_of

# Whose micro-batches say how many documents are divided
STEPS_LOOKED_AT = 16


@contextmanager
def rows_read(console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """What to tell of rows as they are read: on a terminal a line that counts and goes away,
    elsewhere one every ten seconds.
    """
    console = console or Console(highlight=False, force_jupyter=False)
    if not console.is_terminal:
        yield ProgressLines(partial(console.print, soft_wrap=True), "rendered and tokenised")
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,} rows rendered and tokenised"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda count: bar.update(task, completed=count)


def in_words(report: SFTReport) -> Iterator[tuple[str, str]]:
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
            f"sequence-parallel{expert_words(report.options)}"
        ),
    )
    yield "data", _data_words(report)
    yield "a step", _step_words(report, choice, world.processes // sp)
    yield "schedule", _schedule_words(report.config, report.steps)
    yield "memory", memory_words(report)
    if network := _network_words(report):
        yield "network", network
    yield "written", written_words(report)


def _data_words(report: SFTReport) -> str:
    batch = report.config.data.train_batch_size
    lines = list[str]()
    if report.train is not None:
        left = len(report.train.dataset) % batch
        lines.append(f"training: {report.train.said.sentence()}")
        lines += report.train.forms
        lines.append(
            f"{report.steps_per_epoch:,} steps of {batch} an epoch"
            + (f", its last {left} samples left out" if left else "")
        )
    lines.append(f"validation: {report.val.said.sentence()}" if report.val else "no validation")
    lines += report.val.forms if report.val else ()
    return "\n".join(lines)


def _step_words(report: SFTReport, choice: Choice, dp: int) -> str:
    config = report.config
    size = config.data.train_batch_size
    share = -(-size // dp)
    words = f"{size} samples"
    if dp > 1:
        words += f", {share} for each of {dp} groups"
    if report.train is not None:
        lengths = report.train.dataset.lengths
        trained = report.train.dataset.trained
        words += (
            f"; {size * float(lengths.mean()):,.0f} tokens on average, "
            f"{size * float(trained.mean()):,.0f} of them trained"
        )
    padding = "packed without padding"
    if not config.use_remove_padding:
        padding = f"each sample padded to {config.data.max_length:,}"
    return f"{words}; {_micro_batch_words(config, choice, share)}; {padding}"


def _micro_batch_words(config: SFTConfig, choice: Choice, share: int) -> str:
    """`share`: samples of a step for each data-parallel group."""
    asked = config.data.micro_batch_size_per_gpu
    tokens = choice.tokens
    if asked is not None and not fills(config):
        count = -(-share // asked)
        return f"{count} micro-batches of {asked} samples, at most {tokens:,} tokens per GPU"
    why = "" if config.data.max_token_len_per_gpu is not None else " (chosen)"
    if asked is not None:
        why = f" (room for the {asked} longest)"
    of_group = tokens * config.ulysses_sequence_parallel_size
    return f"micro-batches of at most {tokens:,} tokens per GPU{why}, {of_group:,} per group"


def _network_words(report: SFTReport) -> str:
    if report.train is None:
        return ""
    data = report.config.data
    dataset = report.train.dataset
    document = float(dataset.lengths.mean())
    return traffic_words(report, data.train_batch_size * document, document, _divided(report))


def _divided(report: SFTReport) -> float:
    """The share of micro-batches whose documents are divided over sequence-parallel ranks, in the
    first steps.
    """
    data = report.config.data
    sp = report.config.ulysses_sequence_parallel_size
    if report.train is None or sp == 1:
        return 1.0
    packing = packing_of(report, 0, report.world.processes // sp, sp)
    order = StepOrder(data.train_batch_size, data.seed, data.shuffle)
    return divided_share(report.train.dataset, order, packing, min(report.steps, STEPS_LOOKED_AT))


def _schedule_words(config: SFTConfig, steps: int) -> str:
    optim = config.optim
    after = (
        "constant"
        if optim.lr_scheduler == "constant"
        else f"{optim.lr_scheduler} to {optim.lr * optim.min_lr_ratio:g}"
    )
    warmup = f"warm-up over {int(steps * optim.warmup_steps_ratio):,} to {optim.lr:g}"
    return f"{steps:,} optimizer steps; {warmup}, then {after}; gradient norm clipped at {optim.clip_grad:g}"
