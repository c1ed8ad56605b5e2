"""What sequence parallelism costs: a decoder block over sp GPUs against the same block on each GPU
alone, same tokens and documents.

    torchrun --nproc_per_node=2 benchmarks/ulysses.py [--heads 14/2x64,9/3x64,8/4x128] \\
        [--lengths 4096,…] [--json out.json]
    torchrun --nproc_per_node=2 benchmarks/ulysses.py --shape tiny        a look at it on the CPU

A GPU has n tokens. Baseline (sp 1): one document of n tokens a GPU. sp s: the s documents of s GPUs
in one pack, so attention's work is the same, and what is slower is sequence parallelism: four
all-to-alls a layer (q k v and the result, forward and backward), the copies around them, and a rank
with more heads than the others where they don't divide evenly. *all-to-alls*: those four alone.
*floor*: `all_to_all_single` of equal parts into memory that is there, with the bytes of the busiest
rank. Milliseconds of the slowest rank, median (lowest … highest).
"""

from __future__ import annotations

import os
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sft import SHAPES
from table import arguments, attempt, failed, hardware, head, measure, row, save, spread

from retool.batch import Sample, pack
from retool.model.attention.dispatch import choose_backend
from retool.model.block import Execution
from retool.model.catalogue.families import FAMILIES
from retool.model.config import ModelConfig
from retool.model.rope import frequencies, rope_tables
from retool.parallel.collectives import exchange
from retool.parallel.mesh import Mesh, make_mesh
from retool.parallel.ulysses import HeadPlan

HEADS = {"tiny": "4/2x16,3/1x16"}  # of other shapes: 14/2x64,9/3x64,8/4x128


def slowest(run: Any, mesh: Mesh, repeats: int) -> list[float]:
    """Milliseconds of each repeat on the rank that took longest."""
    if mesh.world_group is not None:
        dist.barrier()
    ms = torch.tensor(
        measure(run, mesh.device, repeats)["ms"], dtype=torch.float64, device=mesh.device
    )
    if mesh.world_group is not None:
        dist.all_reduce(ms, dist.ReduceOp.MAX)
    return ms.tolist()


def block_run(config: ModelConfig, mesh: Mesh, plan: HeadPlan, tokens: int) -> Any:
    """Forward and backward of one block, nothing recomputed, on `mesh.sp` documents of `tokens`
    tokens.
    """
    device = mesh.device
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    execution = Execution(
        plan,
        mesh,
        choose_backend(device, dtype, config.head_dim, windowed=config.windowed),
        "none",
        compiled=device.type == "cuda",
    )
    with torch.device(device):
        block = FAMILIES[config.family].Block(config, 0, execution).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    documents = [Sample(np.zeros(tokens, np.int32), np.ones(tokens, bool))] * mesh.sp
    batch = pack(documents).slice(mesh.sp_rank, mesh.sp).to(device)
    cos, sin = rope_tables(batch.positions, frequencies(config, device), config)[0]
    x = torch.randn(tokens, config.hidden, device=device, dtype=dtype, requires_grad=True)
    d_out = torch.randn_like(x)
    wanted = [x, *block.parameters()]
    return lambda: torch.autograd.grad(block(x, cos, sin, batch), wanted, d_out)


def exchanges(mesh: Mesh, plan: HeadPlan, tokens: int) -> tuple[Any, Any]:
    """(the four all-to-alls of a layer, as many equal ones with the bytes of the busiest rank)."""
    group = mesh.sp_group
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    assert group is not None
    routes = [
        sizes
        for way in (plan.to_heads(tokens), plan.to_sequence(tokens))
        for sizes in (way, way[::-1])
    ]
    sends = [torch.randn(sum(out), device=mesh.device, dtype=dtype) for out, _ in routes]
    busiest = torch.tensor([max(sum(out), sum(back)) for out, back in routes], device=mesh.device)
    dist.all_reduce(busiest, dist.ReduceOp.MAX)
    pairs = [
        [torch.zeros(-(-n // mesh.sp) * mesh.sp, device=mesh.device, dtype=dtype) for _ in range(2)]
        for n in busiest.tolist()
    ]

    def ours() -> None:
        for send, (out, back) in zip(sends, routes, strict=True):
            exchange(send, out, back, group)

    def floor() -> None:
        for received, send in pairs:
            dist.all_to_all_single(received, send, group=group)

    return ours, floor


def line_for(config: ModelConfig, mesh: Mesh, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a block and, beyond sp 1, of its all-to-alls."""
    plan = HeadPlan(mesh.sp, mesh.sp_rank, config.heads, config.kv_heads, config.head_dim)
    line: dict[str, Any] = {"block": slowest(block_run(config, mesh, plan, tokens), mesh, repeats)}
    if mesh.sp > 1:
        ours, floor = exchanges(mesh, plan, tokens)
        line["all_to_alls"], line["floor"] = (
            slowest(ours, mesh, repeats),
            slowest(floor, mesh, repeats),
        )
    return line


COLUMNS = [
    "tokens/GPU",
    "sp",
    "block ms",
    "all-to-alls ms",
    "floor ms",
    "share of the block",
    "block against sp 1",
]


def in_table(line: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return [f"{line['tokens']:,}", *failed(str(line["sp"]), line, len(COLUMNS) - 1)]
    block = statistics.median(line["block"])
    cells = [f"{line['tokens']:,}", str(line["sp"]), spread(line["block"])]
    if line["sp"] == 1:
        return [*cells, "", "", "", "1.00× (baseline)"]
    share = statistics.median(line["all_to_alls"]) / block
    against = "" if "failed" in base else f"{block / statistics.median(base['block']):.2f}×"
    return [*cells, spread(line["all_to_alls"]), spread(line["floor"]), f"{share:.1%}", against]


def main() -> None:
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="qwen2.5-0.5b" if cuda else "tiny",
        help="whose width and MLP",
    )
    parser.add_argument("--heads", help="query/key-value heads x head dim, comma-separated")
    parser.add_argument(
        "--lengths", default="4096,16384,65536" if cuda else "64,256", help="tokens of a GPU"
    )
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    meshes = [make_mesh(sp=sp, device=args.device) for sp in range(1, world + 1) if world % sp == 0]
    every = list[dict[str, Any]]()
    mesh = meshes[0]
    if mesh.rank == 0:
        print(f"{world}× {hardware(mesh.device)}, {args.shape}")
    for heads in (args.heads or HEADS.get(args.shape, "14/2x64,9/3x64,8/4x128")).split(","):
        counts, head_dim = heads.split("x")
        query_heads, kv_heads = map(int, counts.split("/"))
        config = replace(
            SHAPES[args.shape], heads=query_heads, kv_heads=kv_heads, head_dim=int(head_dim)
        )
        if mesh.rank == 0:
            head(f"heads {counts}, head dim {head_dim}", COLUMNS)
        for tokens in map(int, args.lengths.split(",")):
            group = list[dict[str, Any]]()
            for over in (m for m in meshes if m.sp <= query_heads):
                found = attempt(partial(line_for, config, over, tokens, args.repeats))
                group.append({"heads": heads, "tokens": tokens, "sp": over.sp, **found})
                every.append(group[-1])
                if mesh.rank == 0:
                    row(in_table(group[-1], group[0]))
                    save(args.json, mesh.device, every)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
