"""Processes and devices: what the launcher started, and whether sizes, GPUs and kernels fit it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from retool.config import Fault
from retool.config.options import RunOptions, TrainerConfig
from retool.model.attention.dispatch import choose_backend, why_not
from retool.model.build import DTYPES
from retool.model.config import ModelConfig
from retool.perf import GIB
from retool.preflight.plan import World


@dataclass(frozen=True)
class Box:
    """The machine that is checked: this one, or (`elsewhere`) another that `--check` plans for, as
    its keys describe it. `memory` is GiB of a GPU, where a key says it.
    """

    elsewhere: bool = False
    memory: float | None = None


def box_of(trainer: TrainerConfig, planning: bool, environment: Mapping[str, str]) -> Box:
    """`planning` (--check) without a launcher is for another box where some key says what that has."""
    described = any(
        value is not None
        for value in (trainer.nnodes, trainer.n_gpus_per_node, trainer.device_memory_gb)
    )
    elsewhere = planning and described and "WORLD_SIZE" not in environment
    return Box(elsewhere, trainer.device_memory_gb)


def read_world(
    nnodes: int | None, per_node: int | None, planning: bool, environment: Mapping[str, str]
) -> tuple[World, list[Fault]]:
    """The launcher's world. `planning` without a launcher: the box that the keys describe.

    Otherwise they must not contradict it.
    """
    launched = "WORLD_SIZE" in environment
    if planning and not launched:
        nodes = nnodes or 1
        each = per_node or 1
        return World(nodes * each, nodes, each), []
    processes = int(environment.get("WORLD_SIZE", 1))
    # Where a launcher doesn't say, all are on this machine
    each = int(environment.get("LOCAL_WORLD_SIZE", processes))
    # Launchers other than torchrun don't say how many machines there are
    nodes = int(environment.get("GROUP_WORLD_SIZE", max(1, processes // each)))
    faults = []
    for key, given, actual, flag in (
        ("trainer.nnodes", nnodes, nodes, "--nnodes"),
        ("trainer.n_gpus_per_node", per_node, each, "--nproc_per_node"),
    ):
        if given is not None and given != actual:
            said = (
                f"the launcher started {actual}"
                if launched
                else f"there is no launcher, so it is {actual}"
            )
            way_out = f"Use torchrun {flag}={given}, or leave the key out."
            faults.append(Fault(f"{key}={given}", f"contradicts the launcher: {said}.", way_out))
    return World(processes, nodes, each), faults


def check_mesh(options: RunOptions, processes: int, heads: int | None) -> Iterator[Fault]:
    """Faults of sizes that don't divide the number of processes, and of sp groups with more ranks
    than heads.
    """
    sp = options.sp
    fsdp_size = options.fsdp.fsdp_size
    legal = [n for n in range(1, processes + 1) if processes % n == 0]
    yield from check_heads(f"{options.sp_key}={sp}", sp, processes, heads)
    if fsdp_size > 0 and processes % fsdp_size:
        problem = f"does not fit {processes} processes: it must divide the world size."
        yield Fault(
            f"{options.fsdp_key}fsdp_size={fsdp_size}", problem, f"Use -1, {_choices(legal)}."
        )


def check_experts(
    options: RunOptions, processes: int, model: ModelConfig | None
) -> Iterator[Fault]:
    """A fault if the ranks that divide experts don't divide their number, or the ranks that share a
    parameter.
    """
    ep = options.fsdp.expert_parallel_size
    where = f"{options.fsdp_key}expert_parallel_size={ep}"
    if ep == 1 or model is None:
        return
    if model.experts is None:
        yield Fault(where, f"a {model.family} model has no experts.", "Leave the key out.")
        return
    # -1: all processes share each parameter
    shards = processes if options.fsdp.fsdp_size < 1 else options.fsdp.fsdp_size
    way_out = f"Use {_choices(legal_expert_sizes(model.experts.count, shards))}."
    if shards % ep:
        problem = (
            f"does not fit the {shards} processes that share a parameter: it must divide them."
        )
        yield Fault(where, problem, way_out)
    elif model.experts.count % ep:
        problem = f"does not fit the model's {model.experts.count} experts: it must divide them."
        yield Fault(where, problem, way_out)


def legal_expert_sizes(experts: int, shards: int) -> list[int]:
    """Over how many of `shards` ranks that share a parameter the experts can be divided."""
    return [n for n in range(1, shards + 1) if shards % n == 0 and experts % n == 0]


def check_heads(where: str, size: int, processes: int, heads: int | None) -> Iterator[Fault]:
    """Faults unless groups of `size` ranks that share the attention heads divide the processes,
    with a query head for each rank.
    """
    fit = [
        n for n in range(1, processes + 1) if processes % n == 0 and (heads is None or n <= heads)
    ]
    if processes % size:
        count = f"{processes} process{'es' if processes > 1 else ''}"
        start = (
            f", or start {size}: torchrun --nproc_per_node={size} (to plan only: "
            f"trainer.n_gpus_per_node={size} --check)"
        )
        way_out = f"Use {_choices(fit)}{start if processes == 1 else ''}."
        yield Fault(where, f"does not fit {count}: it must divide the world size.", way_out)
    if heads is not None and size > heads:
        yield Fault(
            where,
            f"exceeds the model's {heads} query heads: each rank needs one.",
            f"Use {_choices(fit)}.",
        )


def _choices(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_device(device: str, per_node: int, box: Box) -> Iterator[Fault]:
    """Faults unless this machine has a GPU for each of its processes, or GPUs elsewhere are planned
    for.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not found and (box.memory is None or not box.elsewhere):
        remedy = (
            "Use trainer.device=auto, or mend the driver; to plan for GPUs elsewhere, add --check "
            "trainer.device_memory_gb=80."
        )
        yield Fault("trainer.device=cuda", "this machine has no usable GPU.", remedy)
    if not found or device == "cpu" or box.elsewhere:
        return
    if per_node > found:
        yield Fault(
            f"{per_node} processes on this machine",
            f"but {found} GPUs.",
            f"Start {found}: torchrun --nproc_per_node={found}.",
        )
    # A machine's GPUs are taken to be alike
    here = torch.cuda.get_device_properties(0).total_memory / GIB
    if box.memory is not None and box.memory > here:
        problem = f"this machine's GPU has {here:.1f} GiB, and the run would be planned for more."
        yield Fault(
            f"trainer.device_memory_gb={box.memory:g}",
            problem,
            "Leave it out: it is for --check, to plan for another box.",
        )


def check_attention(
    options: RunOptions, head_dim: int, box: Box, windowed: bool = False, capped: bool = False
) -> Iterator[Fault]:
    """A fault if the attention kernel asked for isn't installed, or doesn't compute rightly with
    this dtype and head size here.
    """
    attn = options.model.attn
    asked = options.fsdp.param_dtype
    device = options.trainer.device
    if attn in ("auto", "reference"):
        return
    on_gpu = device != "cpu" and (box.elsewhere or torch.cuda.is_available())
    where = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if on_gpu
        else torch.device("cpu")
    )
    dtype = DTYPES["bf16" if asked == "auto" else asked]
    reason = why_not(attn, where, dtype, head_dim, there=not box.elsewhere, capped=capped)
    if not reason and not box.elsewhere:
        try:
            choose_backend(where, dtype, head_dim, attn, windowed=windowed, capped=capped)
        except ValueError as error:
            reason = str(error).removesuffix(".")
    if reason:
        other = (
            f", or {options.fsdp_key}param_dtype=bf16"
            if on_gpu and asked not in ("auto", "bf16")
            else ""
        )
        yield Fault(
            f"{options.model_key}attn={attn}",
            f"{reason}.",
            f"Use {options.model_key}attn=auto{other}.",
        )
