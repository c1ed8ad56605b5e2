"""A preflight report for people: one table of faults, or the plan in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from retool.memory import Choice
from retool.model.config import ModelConfig
from retool.perf import GIB
from retool.preflight import show_faults, show_plan
from retool.sft.config import SFTConfig
from retool.sft.plan import Report, checkpoint_bytes, fills, gpu_memory, host_bytes, parameter_count


def show(report: Report, console: Console | None = None) -> None:
    """Print the faults, or else the plan and its notes."""
    console = console or Console(highlight=False)
    if report.faults:
        show_faults(report.faults, console)
    else:
        show_plan(list(in_words(report)), report.notes, console)


@contextmanager
def rows_read(console: Console | None = None) -> Iterator[Callable[[int], None] | None]:
    """What to tell of rows as they are read: on a terminal a line that counts and goes away, elsewhere nothing."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield None
        return
    columns = SpinnerColumn(), TextColumn("{task.completed:,} rows rendered and tokenised"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda count: bar.update(task, completed=count)


def in_words(report: Report) -> Iterator[tuple[str, str]]:
    """(topic, text) of what the run will do."""
    config, world, model, choice = report.config, report.world, report.model, report.choice
    assert model is not None and choice is not None
    sp = config.ulysses_sequence_parallel_size
    parameters, heads = parameter_count(model), f"{model.heads}/{model.kv_heads} heads of {model.head_dim}"
    yield "model", f"{model.family}, {_count(parameters)} parameters, {model.layers} layers, {heads}"
    yield "processes", f"{world.processes} on {world.nodes} machine(s): {world.processes // sp} data-parallel × {sp} sequence-parallel"
    yield "data", _data_words(report)
    yield "a step", _step_words(report, choice, world.processes // sp)
    yield "schedule", _schedule_words(config, report.steps)
    yield "memory", _memory_words(report, choice)
    yield "written", _written_words(config, model)


def _data_words(report: Report) -> str:
    batch, lines = report.config.data.train_batch_size, list[str]()
    if report.train is not None:
        left = len(report.train.dataset) % batch
        lines.append(f"training: {report.train.said.sentence()}")
        lines.append(f"{report.steps_per_epoch:,} steps of {batch} an epoch" + (f", its last {left} samples left out" if left else ""))
    lines.append(f"validation: {report.val.said.sentence()}" if report.val else "no validation")
    return "\n".join(lines)


def _step_words(report: Report, choice: Choice, dp: int) -> str:
    config = report.config
    data, sp = config.data, config.ulysses_sequence_parallel_size
    share = -(-data.train_batch_size // dp)
    spread = f"{data.train_batch_size} samples, {share} for each of {dp} groups" if dp > 1 else f"{data.train_batch_size} samples"
    if data.micro_batch_size_per_gpu is not None and not fills(config):
        count = -(-share // data.micro_batch_size_per_gpu)
        micro = f"{count} micro-batches of {data.micro_batch_size_per_gpu} samples, at most {choice.tokens:,} tokens per GPU"
    else:
        chosen = "" if data.max_token_len_per_gpu is not None else " (chosen)"
        if data.micro_batch_size_per_gpu is not None:
            chosen = f" (those of the {data.micro_batch_size_per_gpu} longest)"
        micro = f"micro-batches of at most {choice.tokens:,} tokens per GPU{chosen}, {choice.tokens * sp:,} per group"
    tokens = ""
    if report.train is not None:
        lengths, trained = report.train.dataset.lengths, report.train.dataset.trained
        size = data.train_batch_size
        tokens = f"; {size * float(lengths.mean()):,.0f} tokens on average, {size * float(trained.mean()):,.0f} of them trained"
    padding = "packed without padding" if config.use_remove_padding else f"each sample padded to {data.max_length:,}"
    return f"{spread}{tokens}; {micro}; {padding}"


def _schedule_words(config: SFTConfig, steps: int) -> str:
    optim = config.optim
    after = "constant" if optim.lr_scheduler == "constant" else f"{optim.lr_scheduler} to {optim.lr * optim.min_lr_ratio:g}"
    warmup = f"warm-up over {int(steps * optim.warmup_steps_ratio):,} to {optim.lr:g}"
    return f"{steps:,} optimizer steps; {warmup}, then {after}; gradient norm clipped at {optim.clip_grad:g}"


def _memory_words(report: Report, choice: Choice) -> str:
    p, memory, host = choice.prediction, gpu_memory(report.config), host_bytes(report)
    parts = (("load", p.load), ("forward/backward", p.forward_backward), ("optimizer", p.optimizer), ("save", p.save))
    phases = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
    kept = {"none": "nothing recomputed", "selective": "MLPs recomputed", "full": "all but attention recomputed"}[choice.recompute]
    verdict = "" if memory is None else f"; {'fits' if choice.fits else 'may not fit'} in {memory:.0f} GiB"
    offloaded = f"; {host / GIB:.1f} GiB of host memory on each machine" if host else ""
    return f"peak by phase, GiB on each {'GPU' if memory is not None else 'process'} (predicted): {phases}; {kept}{verdict}{offloaded}"


def _written_words(config: SFTConfig, model: ModelConfig) -> str:
    trainer, each = config.trainer, checkpoint_bytes(model, config) / GIB
    every = f"every {trainer.save_freq} steps and after the last"
    often = {"after_each_epoch": "after each epoch", -1: "after the last step"}.get(trainer.save_freq, every)
    keep = "" if trainer.max_ckpt_to_keep is None else f", the newest {trainer.max_ckpt_to_keep} kept"
    copy = "" if trainer.default_hdfs_dir is None else f"; copied to {trainer.default_hdfs_dir}"
    contents = ", ".join(trainer.checkpoint.save_contents)
    return f"{trainer.default_local_dir}: metrics.jsonl, config.yaml; a checkpoint ({contents}; {each:.2f} GiB) {often}{keep}{copy}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
