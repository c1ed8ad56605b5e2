"""A preflight report for people: one table of faults, or the plan in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retool.config import Fault
from retool.config.options import RunOptions
from retool.config.redact import redact_word
from retool.metrics import printable
from retool.model.borrowed.config import BorrowedConfig
from retool.model.catalogue.families import FAMILIES
from retool.model.config import ModelConfig
from retool.model.costs import parameter_count
from retool.model.traffic.exchanges import Plan, step_exchanges
from retool.model.traffic.layouts import best, on
from retool.model.traffic.machines import USUAL_GPU, Machines, assumed
from retool.perf import GIB
from retool.preflight.plan import (
    RunReport,
    checkpoint_bytes,
    gpu_memory,
    host_bytes,
    setting_of,
)
from retool.preflight.training_memory import predict

# Networks between machines that a plan names: of a machine, all its cards together
USUAL_GBIT = (400, 100)

RECOMPUTED = {
    "none": "nothing recomputed",
    "selective": "MLPs recomputed",
    "full": "all but attention recomputed",
    "offload": "all but attention recomputed, what blocks keep in host memory",
}


def show_faults(faults: Sequence[Fault], console: Console | None = None) -> None:
    """Where, what, and the way out: one table on a terminal, a line each elsewhere.

    Values are shown as text, never as markup.
    """
    console = console or Console(highlight=False, force_jupyter=False)
    title = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}, nothing started"
    if not console.is_terminal:
        _print_lines(
            [title, *(f"  {line}" for fault in faults for line in str(fault).splitlines())], console
        )
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading, style in (("where", "bold"), ("what is wrong", ""), ("the way out", "green")):
        table.add_column(heading, style=style, overflow="fold")
    for fault in faults:
        # first: it remembers the secret, which the problem may repeat
        where = redact_word(fault.where)
        table.add_row(
            *(
                Text("\n".join(map(printable, part.splitlines())))
                for part in (where, fault.problem, fault.remedy)
            )
        )
    console.print(table)


def show_plan(
    plan: Iterable[tuple[str, str]], notes: Sequence[str], console: Console | None = None
) -> None:
    """The plan in plain words, a line or two a topic; notes stand out."""
    console = console or Console(highlight=False, force_jupyter=False)
    if not console.is_terminal:
        lines = [f"{topic}: {line}" for topic, words in plan for line in words.splitlines()]
        _print_lines([*lines, *(f"note: {note}" for note in notes)], console)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for topic, words in plan:
        table.add_row(Text(printable(topic)), Text("\n".join(map(printable, words.splitlines()))))
    for note in notes:
        table.add_row(Text("note", style="yellow"), Text(printable(note), style="yellow"))
    console.print(table)


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


# --- what every command's plan says ---


def model_words(report: RunReport) -> str:
    """Family, size and shape; what runs it."""
    assert report.model is not None
    return f"{shape_words(report.model)}\n{way_words(report.model)}"


def shape_words(model: ModelConfig) -> str:
    """Family, size and shape."""
    count = parameter_count(model)
    size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    return (
        f"{model.family}, {size} parameters, {model.layers} layers, {model.heads}/{model.kv_heads} heads "
        f"of {model.head_dim}"
    )


def expert_words(options: RunOptions) -> str:
    """How experts are divided, for the end of a line on processes."""
    size = options.fsdp.expert_parallel_size
    return "" if size == 1 else f", experts divided over {size}"


def way_words(model: ModelConfig) -> str:
    """Which code runs a model, and why."""
    if isinstance(model, BorrowedConfig):
        because = f"retool has no file for model_type {model.family}"
        if model.family in FAMILIES:
            because = "model.impl=transformers asks for it"
        return f"runs as transformers' own {model.architecture}: {because}"
    return f"runs as retool's own decoder: model_type {model.family} has a file"


def memory_words(
    report: RunReport, phases: Mapping[str, float] | None = None, fits: bool | None = None
) -> str:
    """The predicted peak of each phase; what is recomputed, and whether it fits.

    Without `phases`: those of training alone.
    """
    choice = report.choice
    memory = gpu_memory(report.options)
    host = host_bytes(report)
    assert choice is not None
    if phases is None:
        predicted = choice.prediction
        fits = choice.fits
        phases = {
            "load": predicted.load,
            "forward/backward": predicted.forward_backward,
            "optimizer": predicted.optimizer,
            "save": predicted.save,
        }
    holder = "process" if memory is None else "GPU"
    peaks = ", ".join(f"{name} {size / GIB:.2f}" for name, size in phases.items())
    words = (
        f"peak by phase, GiB on each {holder} (predicted): {peaks}; {RECOMPUTED[choice.recompute]}"
    )
    if not choice.keep_copy:
        words += ", weights cast at every gather"
    if not choice.reshard:
        words += ", weights stay gathered for the backward"
    if memory is not None:
        words += f"; {'fits' if fits else 'may not fit'} in {memory:.0f} GiB"
    if isinstance(report.model, BorrowedConfig):
        words += "; activations counted on one block, not measured on a GPU"
    if host:
        words += f"; {host / GIB:.1f} GiB of host memory on each machine"
    return words


def traffic_words(report: RunReport, tokens: float, document: float, divided: float = 1.0) -> str:
    """What the network between machines costs a step, and the layout that waits less; "" where there
    is one machine, or no GPU.

    `tokens`: of an optimizer step, all ranks together, in documents of `document` tokens. `divided`:
    see `Plan`.
    """
    model = report.model
    memory = gpu_memory(report.options)
    if report.world.nodes == 1 or memory is None or model is None or not tokens:
        return ""
    plan = traffic_plan(report, tokens, divided)
    machines = [assumed(report.world.per_node, gbit, _gpu()) for gbit in USUAL_GBIT]
    length = max(1, round(document))

    def fits(other: Plan) -> bool:
        choice = report.choice
        assert model is not None and choice is not None and memory is not None
        setting = replace(
            setting_of(report.options, report.world),
            shards=other.shards,
            reshard=other.reshard,
            hold=choice.hold,
            keep_copy=choice.keep_copy,
        )
        return predict(model, setting, choice.tokens, choice.recompute).fits(memory)

    exchanges = step_exchanges(model, plan)
    sent = sum(one.sent for one in exchanges if machines[0].spans(one))
    words = (
        f"{sent / 1e9:.2f} GB a step from each GPU in exchanges that leave the machine; "
        f"the step waits for {_waits(model, plan, machines, length)} (expected, not measured)"
    )
    better = best(model, plan, machines, length, fits)
    if better != plan:
        keys = _layout_keys(report.options.fsdp_key, plan, better)
        words += f"; with {keys} for {_waits(model, better, machines, length)}"
    return words


def traffic_plan(report: RunReport, tokens: float, divided: float = 1.0) -> Plan:
    """What decides the traffic of an optimizer step of so many tokens, `divided`: see `Plan`."""
    setting = setting_of(report.options, report.world)
    choice = report.choice
    assert choice is not None
    world = report.world.processes
    mine = max(1, round(tokens / world))
    micro_batches = -(-mine // choice.tokens)
    return Plan(
        setting.shards,
        world // setting.shards,
        setting.sp,
        setting.ep,
        divided=divided,
        tokens=-(-mine // micro_batches),
        micro_batches=micro_batches,
        recompute=choice.recompute,
        reshard=choice.reshard,
        hold=choice.hold,
        compute_bytes=setting.element.compute,
        reduce_bytes=setting.reduce_bytes,
        forward_prefetch=report.options.fsdp.forward_prefetch,
        per_machine=report.world.per_node,
    )


def _gpu() -> str:
    """The GPU of this machine; the usual one where it is planned for another."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else USUAL_GPU


def _waits(model: ModelConfig, plan: Plan, machines: Sequence[Machines], document: int) -> str:
    """The shares of a step that wait, on each of the machines."""
    shares = [on(model, plan, one, document).expected.share for one in machines]
    pairs = zip(shares, USUAL_GBIT, strict=True)
    return ", ".join(f"{share:.0%} of its time at {gbit} Gbit/s" for share, gbit in pairs)


def _layout_keys(prefix: str, now: Plan, better: Plan) -> str:
    """The keys that make one layout of the other."""
    keys = list[str]()
    if better.shards != now.shards:
        keys.append(f"{prefix}fsdp_size={better.shards}")
    if better.reshard != now.reshard:
        keys.append(f"{prefix}reshard_after_forward={str(better.reshard).lower()}")
    return " ".join(keys)


def written_words(report: RunReport, beside: str = "") -> str:
    """The run's folder, what a checkpoint holds, how often and how many."""
    options = report.options
    trainer = options.trainer
    contents = ", ".join(options.checkpoint.save_contents)
    holds = f"{contents}; {checkpoint_bytes(report) / GIB:.2f} GiB"
    often = f"every {trainer.save_freq} steps and after the last"
    if trainer.save_freq == "after_each_epoch":
        often = "after each epoch"
    elif trainer.save_freq == -1:
        often = "after the last step"
    words = (
        f"to {trainer.default_local_dir}: metrics.jsonl, config.yaml{beside}; a checkpoint ({holds}) "
        f"{often}"
    )
    if trainer.max_ckpt_to_keep is not None:
        words += f", the newest {trainer.max_ckpt_to_keep} kept"
    if trainer.default_hdfs_dir is not None:
        words += f"; copied to {trainer.default_hdfs_dir}"
    if report.resume is not None:
        words += f"; goes on from {report.resume}"
    return words
