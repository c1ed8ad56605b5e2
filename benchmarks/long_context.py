"""The longest sequence that trains: one optimizer step on one document of n tokens,
sequence-parallel over all GPUs.

    torchrun --nproc_per_node=2 benchmarks/long_context.py [--shape qwen2.5-0.5b] \\
        [--lengths 65536,131072,…] [--json out.json]
    torchrun --nproc_per_node=2 benchmarks/long_context.py --shape llama3-8b --lengths 65536,131072
    torchrun --nproc_per_node=2 benchmarks/long_context.py --shape tiny --lengths 256,512        a look at it on the CPU

A step warms up (the first length runs twice), then each length is one step, timed from its first
kernel to its last, optimizer included. Activations stay on the device where the memory plan says
that they fit (*full* recomputation), else those of as many layers as must go to the host
(*offload*); weights and moments visit the device where they leave no room for the longest. Time
grows with n²: a length whose step would end after `--budget` seconds, judged by the one before it,
is left out; so is one that the device's memory or the host's wouldn't hold. With
`--device-memory-gb` below the device's own, torch may take no more than that.

*peak*: the allocator's, on the rank that needs most, against `retool.preflight.training_memory`'s
prediction, whose formula then gives the longest n that fits in 80 GiB and in this device. MFU
doesn't count recomputation. Host memory is per GPU: activations, weights and moments.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from sft import SHAPES, random_weights
from table import attempt, failed, hardware, head, row

from retool.batch import PackedBatch, Sample, pack
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig
from retool.model.costs import model_flops, parameter_count
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.collectives import sum_over
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import GIB, StepTimer, device_peak, mfu
from retool.preflight.machine import MAX_PINNED_SHARE, host_memory
from retool.preflight.plan import choose
from retool.preflight.training_memory import DTYPE_BYTES, OUTSIDE, Setting, predict
from retool.sft.step import train_step

Offload = bool | Literal["auto"]
WARM_UP = 4_096  # tokens
HOST_GIB = MAX_PINNED_SHARE * (host_memory() or math.inf) / GIB
ACTIVATIONS: dict[str, Offload] = {"auto": "auto", "full": False, "offload": True}
GUESS = 300e12  # model FLOP/s of a GPU, before one was measured


@dataclass(frozen=True)
class Line:
    """A row: a step that was made, or (`seconds` by FLOPs, nothing measured) what the formula says
    of one.
    """

    tokens: int
    recompute: Recompute
    parked: int  # layers whose activations are in host memory
    seconds: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    measured_gib: float
    predicted_gib: float
    host_gib: float
    note: str = ""


def document(tokens: int, config: ModelConfig, sp: int) -> PackedBatch:
    """One document of random tokens, every one trained."""
    ids = np.random.default_rng(tokens).integers(0, config.vocab, tokens).astype(np.int32)
    return pack([Sample(ids, np.ones(tokens, bool))], multiple=sp)


def build(
    config: ModelConfig, mesh: Mesh, setting: Setting, recompute: Recompute, parked: int
) -> tuple[Sharded, AdamW]:
    """A model with random weights and its optimizer."""
    model = build_decoder(config, mesh, ModelOptions(recompute=recompute, parked=parked))
    random_weights(model)
    return model, AdamW(model, AdamWOptions(), setting.optimizer_offload, setting.param_offload)


def step(model: Sharded, optimizer: AdamW, batch: PackedBatch) -> dict[str, float]:
    """Seconds and peak GiB of one optimizer step; the slowest rank's and the fullest one's."""
    device = model.mesh.device
    cuda = model.mesh.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    timer = StepTimer(device)
    loss, norm, skipped = train_step(
        model, optimizer, [batch], batch.trained_tokens, 1e-5, timer
    ).read()
    seconds = timer.take().seconds()["step"]
    assert math.isfinite(loss) and not skipped, f"loss {loss}, gradient norm {norm}"
    peak = torch.cuda.max_memory_allocated(device) / GIB if cuda else math.nan
    found = torch.tensor([seconds, peak], dtype=torch.float64, device=device)
    if model.mesh.world_group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return {"seconds": float(found[0]), "peak": float(found[1])}


def setting_for(
    config: ModelConfig, mesh: Mesh, tokens: int, gib: float, offload: Offload
) -> Setting:
    """Weights and moments on the device, unless that leaves no room for `tokens` tokens."""
    setting = Setting(
        shards=mesh.shards,
        sp=mesh.sp,
        compute="bf16" if mesh.device.type == "cuda" else "fp32",
        summed=True,
    )
    each = -(-tokens // mesh.sp)
    if choose(config, setting, each, each, "full", gib, offload).fits:
        return setting
    return replace(setting, param_offload=True, optimizer_offload=True)


def host_gib(config: ModelConfig, setting: Setting, activations: float) -> float:
    """Pinned memory of one process."""
    parameters = parameter_count(config)
    each = DTYPE_BYTES[setting.master] * (setting.param_offload + 2 * setting.optimizer_offload)
    return (activations + each * parameters / setting.shards) / GIB


def longest(config: ModelConfig, setting: Setting, recompute: Recompute, gib: float) -> int:
    """The most tokens of a document whose predicted peak fits, a multiple of 1,024 on each rank."""
    low = 0
    high = 1
    while predict(config, setting, 1024 * high, recompute).fits(gib):
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if predict(config, setting, 1024 * middle, recompute).fits(gib)
            else (low, middle)
        )
    return 1024 * low * setting.sp


def extrapolated(
    config: ModelConfig, setting: Setting, mesh: Mesh, gib: float, rate: float, name: str
) -> list[Line]:
    """The longest document with activations on the device, and with them on the host."""
    lines = []
    for recompute in ("full", "offload"):
        tokens = longest(config, setting, recompute, gib)
        if tokens:
            plan = predict(config, setting, tokens // setting.sp, recompute)
            parked = (config.layers - 1) * (recompute == "offload")
            seconds = model_flops(config, [tokens]) / rate / mesh.world
            speed = tokens / seconds / mesh.world
            host = host_gib(config, setting, plan.host)
            note = f"longest in {name}, by the formula"
            lines.append(
                Line(
                    tokens,
                    recompute,
                    parked,
                    seconds,
                    speed,
                    None,
                    math.nan,
                    plan.peak / GIB,
                    host,
                    note,
                )
            )
    return lines


def run(
    config: ModelConfig,
    mesh: Mesh,
    lengths: list[int],
    gib: float,
    budget: float,
    offload: Offload,
    path: Path | None,
    title: str,
) -> list[Line]:
    """A line per length that fits into memory and time, then what the formula says of longer ones."""
    started = time.monotonic()
    lines = list[Line]()
    built = None
    rate = 0.0
    cuda = mesh.device.type == "cuda"
    setting = setting_for(config, mesh, max(lengths), gib, offload)
    peak = device_peak(mesh.device)
    model = optimizer = None
    for tokens in lengths:
        each = -(-tokens // mesh.sp)
        choice = choose(config, setting, each, each, "full", gib, offload)
        plan = predict(config, setting, each, choice.recompute, choice.parked)
        estimate = model_flops(config, [tokens]) / (rate or GUESS) / mesh.world if cuda else 0.0
        late = torch.tensor(
            time.monotonic() - started + estimate > budget, dtype=torch.int32, device=mesh.device
        )
        host = host_gib(config, setting, plan.host)
        reasons = {
            f"needs {plan.peak / GIB:.1f} GiB": choice.fits is False,
            f"needs {host:.1f} GiB of host memory for each of {mesh.world} processes": host
            * mesh.world
            > HOST_GIB,
            f"would take about {estimate:.0f} s, more than --budget {budget:.0f} leaves": bool(
                sum_over(late, mesh.world_group)
            ),
        }
        if any(reasons.values()):
            reason = next(reason for reason, holds in reasons.items() if holds)
            say(mesh, [f"{tokens:,}", f"left out: {reason}", *[""] * (len(COLUMNS) - 2)])
            continue
        found: dict[str, Any] = {}
        if model is None or optimizer is None or built != (choice.recompute, choice.parked):
            model = optimizer = None
            gc.collect()
            built = choice.recompute, choice.parked
            model, optimizer = build(config, mesh, setting, *built)
            # The first sets the pace
            short = document(min(WARM_UP, tokens) if lines else tokens, config, mesh.sp)
            found = attempt(partial(step, model, optimizer, short))
        if "failed" not in found:
            found = attempt(partial(step, model, optimizer, document(tokens, config, mesh.sp)))
        if "failed" in found:
            say(mesh, failed(f"{tokens:,}", found, len(COLUMNS)))
            model = optimizer = None
            continue
        seconds = found["seconds"]
        measured = found["peak"]
        flops = model_flops(config, [tokens])
        rate = flops / seconds / mesh.world
        speed = tokens / seconds / mesh.world
        used = mfu(flops, seconds, mesh.world, peak)
        lines.append(
            Line(
                tokens,
                choice.recompute,
                choice.parked,
                seconds,
                speed,
                used,
                measured,
                plan.peak / GIB,
                host,
            )
        )
        say(mesh, in_table(lines[-1]))
        save(path, mesh, title, lines)
    for name, size in {"80 GiB": 80.0, **({"this device": gib} if cuda else {})}.items():
        more = extrapolated(config, setting, mesh, size, rate or GUESS, name)
        for line in more:
            say(mesh, in_table(line))
        lines += more
    save(path, mesh, title, lines)
    return lines


COLUMNS = [
    "tokens",
    "activations",
    "s/step",
    "tokens/s/GPU",
    "MFU",
    "peak GiB",
    "predicted",
    "error",
    "host GiB/GPU",
]


def say(mesh: Mesh, cells: list[str]) -> None:
    if mesh.rank == 0:
        row(cells)


def save(path: Path | None, mesh: Mesh, title: str, lines: list[Line]) -> None:
    """After every line: a run cut short leaves what it had."""
    if path is not None and mesh.rank == 0:
        path.write_text(
            json.dumps({"hardware": title, "lines": [asdict(line) for line in lines]}, indent=1)
        )


def in_table(line: Line) -> list[str]:
    measured = "" if math.isnan(line.measured_gib) else f"{line.measured_gib:.2f}"
    error = f"{line.predicted_gib / line.measured_gib - 1:+.1%}" if measured else ""
    used = "" if line.mfu is None else f"{line.mfu:.1%}"
    what = f"{line.tokens:,} {line.note}".strip()
    speed = f"{line.seconds:,.1f}", f"{line.tokens_per_second_per_gpu:,.0f}", used
    kept = f"{line.recompute}, {line.parked} layers" if line.parked else line.recompute
    return [
        what,
        kept,
        *speed,
        measured,
        f"{line.predicted_gib:.2f}",
        error,
        f"{line.host_gib:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b" if cuda else "tiny")
    parser.add_argument(
        "--lengths",
        default="65536,131072,262144,524288,1048576" if cuda else "256,512",
        help="tokens, rising",
    )
    parser.add_argument(
        "--device-memory-gb",
        type=float,
        help="GiB to plan for; default: this GPU's (80 without one)",
    )
    parser.add_argument(
        "--budget", type=float, default=150, help="seconds after which no step may end"
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="auto",
        help="keep them on the device, or on the host",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = SHAPES[args.shape]
    mesh = make_mesh(sp=int(os.environ.get("WORLD_SIZE", 1)))
    whole = torch.cuda.get_device_properties(mesh.device).total_memory / GIB if cuda else 80.0
    gib = args.device_memory_gb or whole
    if cuda and gib < whole:
        torch.cuda.set_per_process_memory_fraction((gib - OUTSIDE / GIB) / whole, mesh.device)
    title: str = f"{mesh.world}× {hardware(mesh.device)}, {args.shape}, sp {mesh.sp}"
    if mesh.rank == 0:
        head(title, COLUMNS)
    run(
        config,
        mesh,
        [int(n) for n in args.lengths.split(",")],
        gib,
        args.budget,
        ACTIVATIONS[args.activations],
        args.json,
        title,
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
