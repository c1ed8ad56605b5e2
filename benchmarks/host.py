"""What a micro-batch costs the host, whatever the device does: milliseconds until all of it is
enqueued, and until the device has done it.

    torchrun --nproc_per_node=2 benchmarks/host.py [--tokens 960,2200,8000] [--profile 40] [--json out.json]
    python benchmarks/host.py --shape narrow --device cpu        Python's share alone, on the CPU

A step of one micro-batch (the optimizer included), and each further micro-batch of the same step:
packs of `--tokens` tokens in `--documents` equal documents, through `retool.sft.step.train_step`.
*narrow* is Qwen2.5-0.5B with its layers and a width at which nothing takes the CPU time but Python
and PyTorch around it. Median (lowest … highest) of rank 0. `--profile N` prints the N functions that
took most of a step's time themselves, backward included. `--compile recorded` replays what was recorded of a
compiled micro-batch (`retool.sft.recorded`).
"""

from __future__ import annotations

import cProfile
import os
import pstats
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sft import SHAPES, random_weights
from table import arguments, attempt, failed, hardware, head, row, save, spread

from retool.batch import PackedBatch, Sample, pack, pack_apart
from retool.model.build import ModelOptions, build_decoder
from retool.optim import AdamW, AdamWOptions
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import StepTimer
from retool.sft.recorded import SmallPacks
from retool.sft.step import train_step

NARROW = replace(
    SHAPES["qwen2.5-0.5b"], vocab=512, hidden=64, ffn=64, heads=2, kv_heads=1, head_dim=32
)
# Of a way to run
NAMES = {"yes": ", compiled", "no": "", "recorded": ", compiled and recorded"}
FURTHER = 8  # micro-batches of the longer step, less one


@dataclass(frozen=True)
class Times:
    """Milliseconds of each repeat."""

    enqueued: list[float]
    done: list[float]


def documents(tokens: int, count: int, mesh: Mesh) -> PackedBatch:
    """A pack of `tokens` tokens in `count` documents, each whole on a rank where they spread evenly."""
    length = tokens // count
    samples = [Sample(np.zeros(length, np.int32), np.ones(length, bool))] * count
    if count % mesh.sp:
        return pack(samples, mesh.sp)
    share = count // mesh.sp
    room = share * length
    if mesh.sp == 1:
        return replace(pack(samples), room=room)
    shares = [samples[i : i + share] for i in range(0, count, share)]
    return replace(pack_apart(shares), room=room)


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> Times:
    times = Times([], [])
    # On the CPU others may have the core meanwhile
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for repeat in range(-3, repeats):
        _wait(device)
        start = clock()
        run()
        enqueued = clock()
        _wait(device)
        done = clock()
        if repeat >= 0:
            times.enqueued.append(1e3 * (enqueued - start))
            times.done.append(1e3 * (done - start))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def functions(run: Callable[[], Any], most: int, shown: bool) -> None:
    """Print where the host's time goes by function, without the functions that those call."""
    profile = cProfile.Profile()
    # A backward on a thread of its own would not be seen
    with torch.autograd.set_multithreading_enabled(False):
        run()
        profile.enable()
        for _ in range(3):
            run()
        profile.disable()
    if shown:
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(most)


def measure(mesh: Mesh, how: str, tokens: int, args: Namespace) -> dict[str, Any]:
    """The line of one size."""
    config = NARROW if args.shape == "narrow" else SHAPES[args.shape]
    config = replace(config, layers=args.layers or config.layers)
    options = ModelOptions(
        recompute=args.recompute, use_compile=how != "no", reshard_after_forward=args.reshard
    )
    model = build_decoder(config, mesh, options)
    random_weights(model)
    optimizer = AdamW(model, AdamWOptions())
    timer = StepTimer(mesh.device)
    batch = documents(tokens, args.documents, mesh)
    small = SmallPacks(model, tokens) if how == "recorded" else None

    def step(micro_batches: int) -> None:
        packs = [batch] * micro_batches
        train_step(model, optimizer, packs, tokens, 1e-5, timer, small=small)
        timer.take()

    one = timed(partial(step, 1), mesh.device, args.repeats)
    more = timed(partial(step, 1 + FURTHER), mesh.device, args.repeats)
    if args.profile:
        functions(partial(step, 1 + FURTHER), args.profile, mesh.rank == 0)
    further = [(b - a) / FURTHER for a, b in zip(one.enqueued, more.enqueued, strict=True)]
    return {"enqueued": one.enqueued, "done": one.done, "further": further}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=["narrow", *SHAPES])
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--tokens", default="960,2200,8000")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--compile", default="yes,recorded,no")
    parser.add_argument("--reshard", action="store_true", help="weights don't stay gathered")
    parser.add_argument("--profile", type=int, default=0)
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = make_mesh(sp=world, device=args.device)
    lines: list[dict[str, Any]] = []
    if mesh.rank == 0:
        title = f"{mesh.world}× {hardware(mesh.device)}, {args.shape}, ms"
        head(title, ["tokens", "enqueued", "done", "each further micro-batch"])
    for how in args.compile.split(","):
        for tokens in map(int, args.tokens.split(",")):
            name = f"{tokens}{NAMES[how]}"
            make = partial(measure, mesh, how, tokens, args)
            line = {"name": name, **attempt(make)}
            lines.append(line)
            if mesh.rank == 0:
                cells = [spread(line[key]) for key in ("enqueued", "done", "further")]
                row(failed(name, line, 4) if "failed" in line else [name, *cells])
                save(args.json, mesh.device, lines)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
