"""How much of the sharding's communication the computation hides, from a profiler trace of one
optimizer step.

    torchrun --nproc_per_node=2 benchmarks/fsdp_overlap.py [--shape qwen2.5-0.5b] [--sp 1] [--json out.json]

*communication* is the time with a NCCL kernel on the GPU, *exposed* the part of it with no other
kernel beside it. Rows: nothing overlapped · the forward's gathers · both directions. With sp 2 the
all-to-alls of the attention count too, and are exposed by nature.
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kernels import Interval, device_events, kind_of, length, union
from sft import SHAPES, Documents, random_weights
from table import attempt, failed, hardware, head, row, save
from torch.profiler import ProfilerActivity, profile
from workloads import DOCUMENTS

from retool.data.loader import StepOrder, iterate_steps
from retool.data.packing import Budget, Packing
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig
from retool.optim import AdamW, AdamWOptions
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step

ROWS = {
    "nothing overlapped (baseline)": (False, False),
    "forward": (True, False),
    "forward and backward": (True, True),
}


def exposed(communication: list[Interval], computation: list[Interval]) -> float:
    """Time in `communication` and not in `computation`."""
    return length(union(communication + computation)) - length(union(computation))


def split(found: profile) -> tuple[list[Interval], list[Interval]]:
    """(communication, computation): device intervals in milliseconds."""
    communication = []
    computation = []
    for name, start, end in device_events(found):
        of = communication if kind_of(name) == "communication" else computation
        of.append((start, end))
    return communication, computation


def measure(
    config: ModelConfig, mesh: Mesh, overlap: tuple[bool, bool], scale: int
) -> dict[str, float]:
    """One profiled step of the *full* workload, after two to warm up; milliseconds of rank 0."""
    forward, backward = overlap
    options = ModelOptions(forward_prefetch=forward, backward_overlap=backward)
    model = build_decoder(config, mesh, options)
    random_weights(model)
    optimizer = AdamW(model, AdamWOptions())
    timer = StepTimer(mesh.device)
    data = Documents("full", 3, config.vocab, scale)
    batches = list(
        iterate_steps(
            data,
            StepOrder(DOCUMENTS["full"], seed=0, shuffle=False),
            Packing(Budget(micro_batch_size=mesh.sp), mesh.dp_rank, mesh.dp, mesh.sp),
            stop_step=3,
        )
    )
    for batch in batches[:2]:
        train_step(model, optimizer, batch.micro_batches, batch.trained_tokens, 1e-5, timer)
    seconds = timer.take().seconds()["step"] if mesh.device.type == "cpu" else 0.0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        train_step(
            model, optimizer, batches[2].micro_batches, batches[2].trained_tokens, 1e-5, timer
        )
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
    communication, computation = split(found)
    del model, optimizer
    gc.collect()
    total = length(union(communication + computation))
    return {
        "step": total or seconds * 1e3,
        "communication": length(union(communication)),
        "exposed": exposed(communication, computation),
    }


COLUMNS = ["", "step ms", "communication ms", "exposed ms", "share exposed"]


def in_table(line: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return failed(line["row"], line, len(COLUMNS))
    share = f"{line['exposed'] / line['communication']:.0%}" if line["communication"] else ""
    return [
        line["row"],
        *(f"{line[key]:.1f}" for key in ("step", "communication", "exposed")),
        share,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen2.5-0.5b" if torch.cuda.is_available() else "tiny"
    )
    parser.add_argument("--sp", type=int, default=1)
    parser.add_argument(
        "--scale",
        type=int,
        default=1 if torch.cuda.is_available() else 64,
        help="divide all lengths by this",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    mesh = make_mesh(sp=args.sp)
    lines = []
    if mesh.rank == 0:
        print(f"{hardware(mesh.device)}, {mesh.world} rank(s), {args.shape}, sp {args.sp}")
        head("One step of the full workload", COLUMNS)
    for title, overlap in ROWS.items():
        lines.append(
            {
                "row": title,
                **attempt(partial(measure, SHAPES[args.shape], mesh, overlap, args.scale)),
            }
        )
        if mesh.rank == 0:
            row(in_table(lines[-1]))
            save(args.json, mesh.device, lines)
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
