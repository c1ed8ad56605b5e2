"""Saving and loading a model with AdamW's moments, next to torch.distributed.checkpoint on the same
tensors.

    torchrun --nproc_per_node=2 benchmarks/checkpoint.py [--shape qwen2.5-0.5b] [--repeats 5] \\
        [--folder /somewhere] [--json out.json]
    torchrun --nproc_per_node=2 benchmarks/checkpoint.py --shape tiny            a look at it on the CPU

*stall* is how long the call keeps the training loop: what an asynchronous save is for. *whole* is
until everything is on disk and named. *load* reads weights and both moments back into the ranks'
tensors, files in the page cache. The first save of each row (buffers are made then) is shown apart.
Bytes are all ranks' files. The peer's tensors are the same DTensors, `Shard(0)` rows, that our
files hold; it writes no Hugging Face export, so the rows to compare are those without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sft import SHAPES
from table import attempt, failed, hardware, head, row, save
from torch.distributed.checkpoint.state_dict_loader import load as peer_load
from torch.distributed.checkpoint.state_dict_saver import async_save as peer_async_save
from torch.distributed.checkpoint.state_dict_saver import save as peer_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from retool import checkpoint
from retool.checkpoint import ModelState, SaveOptions, Staging
from retool.checkpoint.flat.rows import named_rows, to_rows
from retool.model.build import ModelOptions, build_decoder
from retool.parallel.mesh import Mesh, make_mesh

Timed = tuple[float, float]  # stall, whole: seconds


def state_of(shape: str, layers: int | None, mesh: Mesh) -> ModelState:
    """Random weights and moments of a model's shape, sharded over the mesh."""
    config = SHAPES[shape] if layers is None else replace(SHAPES[shape], layers=layers)
    layout = build_decoder(config, mesh, ModelOptions()).layout
    flats = [torch.rand(layout.shard_numel, device=mesh.device) for _ in range(3)]
    return ModelState(layout, *flats, updates=1)


def peer_state(state: ModelState, mesh: Mesh) -> dict[str, Any]:
    """The same tensors as DTensors on this device, under the peer's names."""
    device_mesh = init_device_mesh(mesh.device.type, (mesh.world,), mesh_dim_names=("fsdp",))
    out: dict[str, Any] = {}
    for key, flat in (
        ("model", state.params),
        ("exp_avg", state.exp_avg),
        ("exp_avg_sq", state.exp_avg_sq),
    ):
        assert flat is not None
        rows = torch.cat(
            [
                to_rows(
                    u,
                    mesh.shards,
                    mesh.shard_rank,
                    flat[u.start : u.start + u.shard_numel],
                    mesh.shard_group,
                )
                for u in state.layout.units
            ]
        )
        for r in named_rows(state.layout, mesh.shard_rank):
            local = rows[r.offset : r.offset + r.stop - r.start].view(r.shape).clone()
            stride = torch.empty(r.member.shape, device="meta").stride()
            tensor = DTensor.from_local(
                local,
                device_mesh,
                (Shard(0),),
                run_check=False,
                shape=torch.Size(r.member.shape),
                stride=stride,
            )
            out[f"{key}.{r.member.name}"] = tensor
    return out


def together(mesh: Mesh) -> float:
    """The time once every rank is here and its device is idle."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    if mesh.world > 1:
        dist.barrier()
    return time.perf_counter()


def ours(
    state: ModelState, mesh: Mesh, source: Path, options: SaveOptions
) -> Callable[[Path], Timed]:
    staging = Staging(mesh)
    staging.prepare(state, mesh, options)
    staging.ready()  # a run's first save comes long after its start

    def run(folder: Path) -> Timed:
        begin = together(mesh)
        pending = checkpoint.save(
            folder,
            state,
            mesh,
            checkpoint.TrainingState(step=1),
            model_folder=source,
            options=options,
            staging=staging,
        )
        stall = time.perf_counter() - begin
        result = pending.wait()
        assert result.error is None, result.error
        return stall, time.perf_counter() - begin

    return run


def theirs(content: dict[str, Any], mesh: Mesh, asynchronous: bool) -> Callable[[Path], Timed]:
    def run(folder: Path) -> Timed:
        begin = together(mesh)
        if not asynchronous:
            peer_save(content, checkpoint_id=folder)
            whole = time.perf_counter() - begin
            return whole, whole
        future: Any = peer_async_save(content, checkpoint_id=folder)
        stall = time.perf_counter() - begin
        future.result()
        return stall, time.perf_counter() - begin

    return run


def measure(
    run: Callable[[Path], Timed],
    load: Callable[[Path], object],
    mesh: Mesh,
    root: Path,
    repeats: int,
) -> dict[str, Any]:
    """Save `repeats` + 1 times into fresh folders; load the last one."""
    times = []
    loads = []
    size = 0
    for repeat in range(repeats + 1):
        folder = root / f"run{repeat}"
        times.append(slowest(run(folder), mesh))
        together(mesh)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        if repeat:
            begin = together(mesh)
            load(folder)
            loads.append(slowest((together(mesh) - begin,), mesh)[0])
        together(mesh)
        if mesh.rank == 0:
            shutil.rmtree(folder)
    return {
        "first": times[0],
        "stall": [t[0] for t in times[1:]],
        "whole": [t[1] for t in times[1:]],
        "load": loads,
        "bytes": size,
    }


def slowest(seconds: tuple[float, ...], mesh: Mesh) -> tuple[float, ...]:
    """The slowest rank's times: the one that the others wait for."""
    tensor = torch.tensor(seconds, device=mesh.device)
    if mesh.world > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def model_files(folder: Path) -> Path:
    """A source model's small files: the benchmark has no real one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        '{"model_type": "qwen2", "torch_dtype": "float32", "tie_word_embeddings": true}'
    )
    return folder


COLUMNS = ["", "stall s", "first stall s", "whole s", "GB/s", "GB", "load s"]


def in_table(line: dict[str, Any]) -> list[str]:
    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f})"

    if "failed" in line:
        return failed(line["row"], line, len(COLUMNS))
    rate = line["bytes"] / statistics.median(line["whole"]) / 1e9
    size = line["bytes"] / 1e9
    return [
        line["row"],
        cell(line["stall"]),
        f"{line['first'][0]:.3f}",
        cell(line["whole"]),
        f"{rate:.2f}",
        f"{size:.2f}",
        cell(line["load"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen2.5-0.5b" if torch.cuda.is_available() else "tiny"
    )
    parser.add_argument("--layers", type=int, help="only so many layers, where memory is short")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "retool-checkpoint-benchmark"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="*",
        default=range(5),
        help="which rows, from 0; 3 and 4 are the peer's",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    mesh = make_mesh()
    if mesh.world == 1 and max(options.rows) > 2:
        parser.error(
            "run it with torchrun --nproc_per_node=2 or more: the peer needs a process group. Or without "
            "it: --rows 0 1 2"
        )
    state = state_of(options.shape, options.layers, mesh)
    source = model_files(options.folder / "source")
    shards = ("model", "optimizer", "extra")
    variants = {
        "retool": SaveOptions(contents=shards),
        "retool, async": SaveOptions(contents=shards, async_save=True),
        "retool, async, with export": SaveOptions(async_save=True),
    }

    def load(folder: Path) -> object:
        return checkpoint.load(folder / "global_step_1", state, mesh, seed=0)

    content = peer_state(state, mesh) if max(options.rows) > 2 else {}

    def peer(folder: Path) -> object:
        return peer_load(content, checkpoint_id=folder)

    runs: list[tuple[str, Callable[[Path], Timed], Callable[[Path], object]]] = [
        *((name, ours(state, mesh, source, variant), load) for name, variant in variants.items()),
        ("torch.distributed.checkpoint", theirs(content, mesh, False), peer),
        ("torch.distributed.checkpoint, async", theirs(content, mesh, True), peer),
    ]
    lines = list[dict[str, Any]]()
    if mesh.rank == 0:
        elements = sum(m.numel for _, m in state.layout.members)
        print(
            hardware(mesh.device),
            f"{mesh.world} rank(s)",
            f"{options.shape}: {elements / 1e6:.0f}M parameters",
            sep=", ",
        )
        head("Checkpoints", COLUMNS)
    for name, run, read in (runs[i] for i in options.rows):
        found = attempt(partial(measure, run, read, mesh, options.folder, options.repeats))
        lines.append({"row": name, "world": mesh.world, "shape": options.shape, **found})
        if mesh.rank == 0:
            row(in_table(lines[-1]))
            save(options.json, mesh.device, lines)
    if mesh.rank == 0:
        shutil.rmtree(options.folder, ignore_errors=True)
    if mesh.world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
