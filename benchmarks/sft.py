"""SFT throughput on the two workloads of the published comparison: tokens per second per GPU, MFU,
peak memory.

    torchrun --nproc_per_node=2 benchmarks/sft.py [--rows full,mixed-sp2,…] [--repeats 2] [--json out.json]
    torchrun --nproc_per_node=2 benchmarks/sft.py --shape tiny --scale 64        a look at it on the CPU

`workloads.py` says what documents *full*, *mixed* and the others are. The rows `experts-…` are for
`--shape 30b-a3b-6-layers`, with and without expert parallelism: MFU counts the experts that a token
runs through. Every token is trained, ids are random, data is in memory; bf16 compute, fp32 master
and AdamW. A step is timed from its first kernel to its last, optimizer included; padding doesn't
count as tokens. Steps 4 to 8 of each repeat count.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import kernels
import numpy as np
import torch
import torch.distributed as dist
from table import attempt, failed, save, some_of
from workloads import COUNTED, DOCUMENTS, STEPS, documents_of, lengths_of

from retool.batch import Sample
from retool.data.loader import StepOrder, iterate_steps
from retool.data.packing import Budget, Packing
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import Experts, ModelConfig
from retool.model.costs import model_flops
from retool.model.decoder import plan_attention
from retool.model.fused import gated
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import GIB, StepTimer, device_peak, mfu
from retool.sft.step import train_step

BLANK = {
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "o_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "max_position": 0,
}
SHAPES = {
    "qwen2.5-0.5b": ModelConfig(
        "qwen2",
        vocab=151_936,
        hidden=896,
        ffn=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        tied=True,
        qkv_bias=True,
        **BLANK,
    ),
    "llama3-8b": ModelConfig(
        "llama",
        vocab=128_256,
        hidden=4096,
        ffn=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        tied=False,
        qkv_bias=False,
        **BLANK,
    ),
    # Qwen3-30B-A3B's widths
    "30b-a3b-6-layers": replace(
        ModelConfig(
            "qwen3_moe",
            vocab=151_936,
            hidden=2048,
            ffn=768,
            layers=6,
            heads=32,
            kv_heads=4,
            head_dim=128,
            tied=False,
            qkv_bias=False,
            experts=Experts(count=128, per_token=8, width=768, normalised=True),
            **BLANK,
        ),
        qk_norm=True,
    ),
    "tiny-experts": replace(
        ModelConfig(
            "qwen3_moe",
            vocab=512,
            hidden=64,
            ffn=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            tied=True,
            qkv_bias=False,
            experts=Experts(count=8, per_token=2, width=32, normalised=True),
            **BLANK,
        ),
        qk_norm=True,
    ),
    "tiny": ModelConfig(
        "qwen2",
        vocab=512,
        hidden=64,
        ffn=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        tied=True,
        qkv_bias=True,
        **BLANK,
    ),
}
# The best peer of each workload on two H200s, torch 2.11, 2026-11-29 (`peers.py`): the baseline
PEERS = {
    "full": ("TRL 1.16, FSDP2, liger", 55_193, 20.0),
    "mixed": ("TRL 1.16, FSDP2, liger", 55_966, 35.4),
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    `samples` a micro-batch of an sp group, or `tokens` a GPU; `keep_copy`: `shard`'s; `steps` where
    fewer do. `ep` ranks divide experts.
    """

    title: str
    workload: str
    sp: int
    recompute: Recompute
    samples: int | None = None
    tokens: int | None = None
    padded: bool = False
    keep_copy: bool = True
    steps: int = STEPS
    ep: int = 1


ROWS = {
    "padded": Row(
        "mixed, padded to 16,384, sp 1", "mixed", 1, "none", samples=1, padded=True, steps=5
    ),
    "mixed": Row("mixed, packed, sp 1", "mixed", 1, "none", tokens=32_768),
    "mixed-sp2": Row("mixed, packed, sp 2", "mixed", 2, "none", tokens=32_768),
    "mixed-recompute": Row("mixed, packed, sp 2, recomputation", "mixed", 2, "full", tokens=32_768),
    "full": Row("full, sp 2: the published command", "full", 2, "none", samples=2),
    "full-selective": Row("full, sp 2, selective recomputation", "full", 2, "selective", samples=2),
    "full-recompute": Row("full, sp 2, full recomputation", "full", 2, "full", samples=2),
    "full-sp1": Row("full, sp 1", "full", 1, "none", samples=1),
    "4096": Row("64 documents of 4,096, sp 1", "4096", 1, "none", tokens=32_768),
    "8b": Row(
        "8,192 tokens per GPU, sp 1, recomputation", "full", 1, "full", samples=1, keep_copy=False
    ),  # so that 80 GB suffice
    "8b-none": Row(
        "8,192 tokens per GPU, sp 1, nothing recomputed", "full", 1, "none", samples=1
    ),  # 110 GiB
    "experts-16k": Row("micro-batches of 16,384 tokens, ep 1", "few", 1, "none", tokens=16_384),
    "experts-16k-ep2": Row(
        "micro-batches of 16,384 tokens, ep 2", "few", 1, "none", tokens=16_384, ep=2
    ),
    "experts-4k": Row("micro-batches of 4,096 tokens, ep 1", "few", 1, "none", tokens=4_096),
    "experts-4k-ep2": Row(
        "micro-batches of 4,096 tokens, ep 2", "few", 1, "none", tokens=4_096, ep=2
    ),
}


class Documents:
    """Random documents of a workload, for `steps` optimizer steps, in order."""

    def __init__(self, workload: str, steps: int, vocab: int, scale: int) -> None:
        self.lengths = lengths_of(workload, steps, scale)
        self.trained = self.lengths - 1
        self._tokens = documents_of(self.lengths, vocab)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._tokens[index], np.ones(len(self._tokens[index]), bool))


def random_weights(model: Sharded) -> None:
    """Normal matrices (σ 0.02), norms of one, like a fresh model."""
    torch.manual_seed(model.mesh.rank)
    model.master.normal_(0, 0.02)
    for unit in model.layout.units:
        low = unit.low(model.mesh.shard_rank)
        for slot in unit.slots:
            start = max(low, slot.offset)
            stop = min(low + unit.shard_numel, slot.offset + slot.numel)
            if "norm" in slot.name and start < stop:
                model.master[unit.start + start - low : unit.start + stop - low] = 1.0
    model.refresh()


def measure(
    row: Row,
    config: ModelConfig,
    mesh: Mesh,
    scale: int,
    compiled: Any,
    reshard: bool = True,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Train `row.steps` steps; seconds of the counted ones, tokens and FLOPs of a mean step, peak
    memory. On the CPU gradients are held until a step's last micro-batch, as a run's plan has it
    there.

    With `profile` one step more is run, and what its time went to is printed and written there.
    """
    options = ModelOptions(
        recompute=row.recompute,
        use_compile=compiled,
        keep_copy=row.keep_copy,
        reshard_after_forward=reshard,
    )
    model = build_decoder(config, mesh, options)
    hold = mesh.device.type == "cpu"
    random_weights(model)
    optimizer = AdamW(model, AdamWOptions())
    data = Documents(row.workload, row.steps, config.vocab, scale)
    plan_attention(model, data.lengths.tolist())
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timer = StepTimer(mesh.device)
    marks = []
    tokens = []
    flops = []
    losses = []
    batch = None
    pad_to = 16_384 // scale if row.padded else None
    budget = Budget(None if row.tokens is None else row.tokens // scale, row.samples)
    for batch in iterate_steps(
        data,
        StepOrder(DOCUMENTS[row.workload], seed=0, shuffle=False),
        Packing(budget, mesh.dp_rank, mesh.dp, mesh.sp, pad_to),
        stop_step=row.steps,
        prefetch=row.steps,
    ):
        measured = train_step(
            model, optimizer, batch.micro_batches, batch.trained_tokens, 1e-5, timer, hold
        )
        marks.append(timer.take())
        losses.append(measured)
        tokens.append(batch.real_tokens)
        flops.append(model_flops(config, data.lengths[list(batch.samples)].tolist()))
    if profile is not None and batch is not None:
        with kernels_of(profile if mesh.rank == 0 else None, row.title):
            train_step(model, optimizer, batch.micro_batches, batch.trained_tokens, 1e-5, timer)
    counted = slice(min(COUNTED.start, row.steps - 2), row.steps)
    seconds = [m.seconds()["step"] for m in marks[counted]]
    peak = torch.cuda.max_memory_allocated() / GIB if mesh.device.type == "cuda" else float("nan")
    reserved = (
        torch.cuda.max_memory_reserved() / GIB if mesh.device.type == "cuda" else float("nan")
    )
    return {
        "seconds": seconds,
        "tokens": tokens[counted],
        "flops": flops[counted],
        "peak": peak,
        "reserved": reserved,
        "loss": [m.read()[0] for m in losses],
    }


@contextmanager
def kernels_of(path: Path | None, title: str) -> Iterator[None]:
    """Profile what is inside, if there is a path to write to."""
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        yield
        torch.cuda.synchronize()
    kernels.write(found, path, title)


def line(runs: list[dict[str, Any]], mesh: Mesh) -> dict[str, Any]:
    """A table line from the repeats of a row."""
    rates = [
        t / s / mesh.world
        for run in runs
        for t, s in zip(run["tokens"], run["seconds"], strict=True)
    ]
    means = [sum(run["tokens"]) / sum(run["seconds"]) / mesh.world for run in runs]
    used = mfu(
        sum(map(sum, (r["flops"] for r in runs))),
        sum(map(sum, (r["seconds"] for r in runs))),
        mesh.world,
        device_peak(mesh.device),
    )
    return {
        "tokens_per_second_per_gpu": statistics.mean(means),
        "runs": means,
        "low": min(rates),
        "high": max(rates),
        "mfu": used,
        "world": mesh.world,
        "peak_gib": max(r["peak"] for r in runs),
        "reserved_gib": max(r["reserved"] for r in runs),
        "first_loss": runs[0]["loss"][0],
        "last_loss": runs[0]["loss"][-1],
    }


def show(lines: list[dict[str, Any]], shape: str, mesh: Mesh) -> None:
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    print(f"\n{mesh.world}× {device}, torch {torch.__version__}, {shape}\n")
    print(
        "| | tok/s/GPU | each run | MFU | peak GiB | reserved | loss |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for workload in dict.fromkeys(ROWS[entry["name"]].workload for entry in lines):
        if shape == "qwen2.5-0.5b" and workload in PEERS:
            title, rate, gib = PEERS[workload]
            print(
                f"| baseline: {workload}, {title} (2×H200, 2026-11-29) | {rate:,} | | | {gib} | | |"
            )
        for entry in (e for e in lines if ROWS[e["name"]].workload == workload):
            if "failed" in entry:
                print(f"| {' | '.join(failed(entry['row'], entry, 7))} |")
                continue
            used = "" if entry["mfu"] is None else f"{entry['mfu']:.1%}"
            each = " · ".join(f"{r:,.0f}" for r in entry["runs"])
            print(
                f"| {entry['row']} | {entry['tokens_per_second_per_gpu']:,.0f} | {each} | {used} | "
                f"{entry['peak_gib']:.1f} | {entry['reserved_gib']:.1f} | {entry['first_loss']:.2f} "
                f"→ {entry['last_loss']:.2f} |"
            )


def repeated(name: str, row: Row, mesh: Mesh, args: argparse.Namespace) -> dict[str, Any]:
    """The line of all repeats."""
    runs = []
    for _ in range(args.repeats):
        scale = args.scale * (2 if name.startswith("8b") else 1)
        compiled = False if args.no_compile else "auto"
        profile = args.profile and args.profile.with_suffix(f".{name}.json")
        runs.append(
            measure(row, SHAPES[args.shape], mesh, scale, compiled, not args.no_reshard, profile)
        )
        gc.collect()  # a sharded module and its hooks refer to each other
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
    return line(runs, mesh)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = "padded,mixed,mixed-sp2,mixed-recompute,full,full-selective,full-recompute,full-sp1"
    parser.add_argument("--rows", type=some_of(ROWS), default=rows, help=", ".join(ROWS))
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        help="divide all lengths by this, for a look on a small machine",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--no-reshard",
        action="store_true",
        help="weights stay gathered after the forward (reshard_after_forward=false)",
    )
    parser.add_argument(
        "--compilers-gate",
        action="store_true",
        help="gate and up are multiplied by the compiler's kernels, not by ours",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--profile",
        type=Path,
        help="print what a step's time goes to; a row's kernels go to this file, .ROW.json behind it",
    )
    args = parser.parse_args()
    if args.compilers_gate:
        gated.fused_gated_down = None
    world = make_mesh()
    lines = []
    meshes = {}
    for name in args.rows.split(","):
        row = ROWS[name]
        if row.sp > world.world:
            row = replace(
                row, sp=world.world, title=row.title.replace(f"sp {row.sp}", f"sp {world.world}")
            )
        ep = min(row.ep, world.world)
        if (row.sp, ep) not in meshes:
            meshes[row.sp, ep] = make_mesh(sp=row.sp, ep=ep)
        mesh = meshes[row.sp, ep]
        lines.append(
            {
                "name": name,
                "row": row.title,
                "shape": args.shape,
                **attempt(partial(repeated, name, row, mesh, args)),
            }
        )
        if world.rank == 0:
            last = lines[-1]
            found = (
                last.get("failed")
                or f"{last['tokens_per_second_per_gpu']:,.0f} tok/s/GPU, {last['peak_gib']:.1f} GiB"
            )
            print(f"{row.title}: {found}", flush=True)
            save(args.json, world.device, lines)
    if world.rank == 0:
        show(lines, args.shape, world)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
