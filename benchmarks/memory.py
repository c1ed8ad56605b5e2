"""Peak memory of training steps, predicted from shapes alone (`retool.preflight.training_memory`) and
measured.

    torchrun --nproc_per_node=2 benchmarks/memory.py [--rows 0.5b-none,…] [--json out.json]
    torchrun --nproc_per_node=2 benchmarks/memory.py --shape tiny --scale 64        a look at it on the CPU

Each row makes the model and its optimizer, trains one step to warm up and one that counts (two
micro-batches through `retool.sft.step.train_step`), and compares the allocator's peak, the largest
of all ranks, with the prediction, by phase. Every token is trained; bf16 compute, fp32 master and
AdamW. *long*: one document a pack; *short*: documents of 256 tokens. Error = (predicted − measured)
/ measured of the peak over all phases.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sft import BLANK, SHAPES
from table import attempt, failed, hardware, head, save, some_of
from table import row as print_row

from retool.batch import PackedBatch, Sample, pack
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import GIB, StepTimer
from retool.preflight.training_memory import Prediction, Setting, predict
from retool.sft.step import train_step

MODELS = SHAPES | {
    "qwen2.5-1.5b": ModelConfig(
        "qwen2",
        vocab=151_936,
        hidden=1536,
        ffn=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        head_dim=128,
        tied=True,
        qkv_bias=True,
        **BLANK,
    ),
    "qwen2.5-3b": ModelConfig(
        "qwen2",
        vocab=151_936,
        hidden=2048,
        ffn=11_008,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        tied=True,
        qkv_bias=True,
        **BLANK,
    ),
    "qwen3-1.7b": ModelConfig(
        "qwen3",
        vocab=151_936,
        hidden=2048,
        ffn=6144,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        tied=True,
        qkv_bias=False,
        **{**BLANK, "qk_norm": True},
    ),
}
SHORT = 256


@dataclass(frozen=True)
class Row:
    """A line of the table; `tokens` per GPU in a micro-batch."""

    shape: str
    sp: int
    tokens: int
    recompute: Recompute
    long: bool = True
    offload: tuple[bool, bool] = (False, False)  # master weights, moments
    hold: bool = False  # gradients added up on each GPU, reduced once a step


ROWS = {  # rows of one shape and sp together: they share compiled code
    "0.5b-none": Row("qwen2.5-0.5b", 2, 16_384, "none"),
    "0.5b-selective": Row("qwen2.5-0.5b", 2, 16_384, "selective"),
    "0.5b-full": Row("qwen2.5-0.5b", 2, 16_384, "full"),
    "0.5b-short": Row("qwen2.5-0.5b", 1, 8_192, "none", long=False),
    "0.5b-held": Row("qwen2.5-0.5b", 1, 2_048, "none", long=False, hold=True),
    "0.5b-offload": Row("qwen2.5-0.5b", 1, 8_192, "full", offload=(True, True)),
    "8b-full": Row("llama3-8b", 1, 4_096, "full"),
    "8b-short": Row("llama3-8b", 1, 8_192, "selective", long=False),
    "1.5b-selective": Row("qwen2.5-1.5b", 1, 8_192, "selective"),
    "1.5b-offload": Row("qwen2.5-1.5b", 1, 16_384, "full", long=False, offload=(False, True)),
    "3b-none": Row("qwen2.5-3b", 2, 8_192, "none"),
    "3b-full": Row("qwen2.5-3b", 2, 16_384, "full"),
    "qwen3-1.7b": Row("qwen3-1.7b", 1, 8_192, "none"),
}


class PeakTimer(StepTimer):
    """Takes the allocator's peak of each phase instead of its time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.device, self.peaks = device, dict[str, float]()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        restart(self.device)
        yield
        self.peaks[name] = peak(self.device)


def restart(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float:
    """Largest number of bytes allocated since `restart`; NaN on the CPU, whose allocator doesn't
    count.
    """
    if device.type != "cuda":
        return math.nan
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device))


def make_pack(row: Row, tokens: int, sp: int, vocab: int) -> PackedBatch:
    """A pack of random documents that gives each GPU `tokens` tokens."""
    size = tokens * sp if row.long else min(SHORT, tokens * sp)
    rng = np.random.default_rng(0)
    documents = [
        Sample(rng.integers(0, vocab, size).astype(np.int32), np.ones(size, bool))
        for _ in range(tokens * sp // size)
    ]
    return pack(documents, multiple=sp)


def measure(row: Row, config: ModelConfig, mesh: Mesh, tokens: int) -> dict[str, float]:
    """Peak bytes by phase on the rank that needs most."""
    release(mesh.device)
    before = torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else 0
    restart(mesh.device)
    model = build_decoder(config, mesh, ModelOptions(recompute=row.recompute))
    optimizer = AdamW(
        model, AdamWOptions(), offload_master=row.offload[0], offload_moments=row.offload[1]
    )
    timer = PeakTimer(mesh.device)
    peaks = {"load": peak(mesh.device)}
    batch = make_pack(row, tokens, mesh.sp, config.vocab)
    for _ in range(2):
        train_step(
            model,
            optimizer,
            [batch, batch],
            2 * mesh.dp * batch.trained_tokens,
            1e-5,
            timer,
            row.hold,
        )
    found = torch.tensor(
        [value - before for value in (peaks | timer.peaks).values()],
        dtype=torch.float64,
        device=mesh.device,
    )
    if mesh.world_group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return dict(zip(peaks | timer.peaks, found.tolist(), strict=True))


def release(device: torch.device) -> None:
    """Let go of the row before: modules and their hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(
    name: str,
    row: Row,
    world: int,
    prediction: Prediction,
    measured: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What the table and `--json` say of a row, in GiB."""
    whole = max(measured.values())
    predicted = {
        "load": prediction.load,
        "forward_backward": prediction.forward_backward,
        "optimizer": prediction.optimizer,
    }
    return {
        "name": name,
        "shape": row.shape,
        "world": world,
        "sp": row.sp,
        "tokens_per_gpu": row.tokens,
        "recompute": row.recompute,
        "documents": "long" if row.long else "short",
        "held": row.hold,
        "offload": [
            name for name, on in zip(("weights", "moments"), row.offload, strict=True) if on
        ],
        "predicted_gib": {phase: size / GIB for phase, size in predicted.items()},
        "measured_gib": {phase: size / GIB for phase, size in measured.items()},
        "error": max(predicted.values()) / whole - 1,
        "seconds": seconds,
    }


COLUMNS = ["", "load", "forward/backward", "optimizer", "peak", "error"]


def in_table(entry: dict[str, Any]) -> list[str]:
    """A row of the Markdown table."""
    if "failed" in entry:
        return failed(entry["name"], entry, len(COLUMNS))
    what = (
        f"{entry['shape']}, sp {entry['sp']}, {entry['tokens_per_gpu']:,} tokens per GPU "
        f"({entry['documents']}), {entry['recompute']}"
    )
    if entry["held"]:
        what += ", gradients held"
    if entry["offload"]:
        what += f", {' and '.join(entry['offload'])} offloaded"
    phases = (
        f"{entry['predicted_gib'][p]:.2f} / {entry['measured_gib'][p]:.2f}"
        for p in ("load", "forward_backward", "optimizer")
    )
    whole = (
        f"{max(entry['predicted_gib'].values()):.2f} / {max(entry['measured_gib'].values()):.2f}"
    )
    return [what, *phases, whole, f"{entry['error']:+.1%}"]


def measured_line(name: str, row: Row, mesh: Mesh, setting: Setting) -> dict[str, Any]:
    begun = time.monotonic()
    prediction = predict(MODELS[row.shape], setting, row.tokens, row.recompute)
    measured = measure(row, MODELS[row.shape], mesh, row.tokens)
    return line(name, row, mesh.world, prediction, measured, time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=some_of(ROWS),
        default=",".join(ROWS),
        help="any of " + ", ".join(ROWS),
    )
    parser.add_argument("--shape", choices=MODELS, help="use this shape in every row")
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        help="divide all token counts by this, for a look on a small machine",
    )
    parser.add_argument(
        "--budget", type=float, default=150, help="seconds after which no further row is begun"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    world = make_mesh()
    meshes = dict[int, Mesh]()
    lines = list[dict[str, Any]]()
    last = None
    left_out = list[str]()
    if world.rank == 0:
        head(f"{world.world}× {hardware(world.device)}: GiB predicted / measured", COLUMNS)
    for name in args.rows.split(","):
        row = ROWS[name]
        row = replace(
            row,
            shape=args.shape or row.shape,
            sp=min(row.sp, world.world),
            tokens=row.tokens // args.scale,
        )
        spent = torch.tensor(time.monotonic() - started)
        if world.world_group is not None:
            dist.broadcast(spent := spent.to(world.device), 0)
        if float(spent) > args.budget:
            left_out.append(name)
            continue
        if (row.shape, row.sp) != last:
            torch._dynamo.reset()  # type: ignore[attr-defined]
            last = row.shape, row.sp
        mesh = meshes.setdefault(row.sp, make_mesh(sp=row.sp))
        setting = Setting(
            shards=mesh.shards,
            sp=mesh.sp,
            compute="bf16" if mesh.device.type == "cuda" else "fp32",
            param_offload=row.offload[0],
            optimizer_offload=row.offload[1],
            hold=row.hold and mesh.shards > 1,
            summed=True,
        )
        lines.append({"name": name, **attempt(partial(measured_line, name, row, mesh, setting))})
        if world.rank == 0:
            print_row(in_table(lines[-1]))
            save(args.json, world.device, lines)
    if world.rank == 0:
        if errors := [abs(entry["error"]) for entry in lines if "error" in entry]:
            print(f"\nlargest error {max(errors):.1%}; {time.monotonic() - started:.0f} s")
        if left_out:
            print(f"left out after {args.budget:.0f} s: {', '.join(left_out)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
