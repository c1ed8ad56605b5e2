"""Hugging Face weights out of the ranks' row buffers, one unit at a time: nobody holds the whole
model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from retool.checkpoint.flat.rows import unit_numel, unit_rows
from retool.checkpoint.format.safetensors import WeightsWriter
from retool.parallel.agreement import agreed
from retool.parallel.fsdp.layout import Layout, UnitLayout
from retool.parallel.mesh import Mesh


def export_weights(
    layout: Layout,
    mesh: Mesh,
    buffer: torch.Tensor,
    folder: Path,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Rank 0 writes `folder`'s safetensors from every rank's rows of everything; returns the files'
    checksums by name (rank 0 only).

    A collective call over `group` (gloo, all ranks). `Failed` on all ranks where one can't go on:
    they agree before every exchange. Tied names are left out: Hugging Face restores them from the
    config.
    """
    rank = mesh.rank
    at = 0
    shapes = {m.name: m.shape for unit in layout.units for m in unit.members}
    writer = agreed(
        rank, group, lambda: WeightsWriter(folder, shapes, dtype) if rank == 0 else None
    )
    try:
        for unit in layout.units:
            parts = agreed(
                rank, group, partial(_prepare, unit, layout.shards, mesh, buffer[at:], dtype)
            )
            _gather(parts, rank, group)
            agreed(rank, group, partial(_write_unit, unit, layout.shards, parts, writer))
            at += unit_numel(unit, layout.shards, mesh.shard_rank)
        agreed(rank, group, lambda: writer.close() if writer is not None else None)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    return writer.checksums if writer is not None else {}


def _prepare(
    unit: UnitLayout, shards: int, mesh: Mesh, buffer: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """This rank's rows of a unit, which `buffer` begins with; on rank 0 room for the others' too;
    nothing on replicas.
    """
    if mesh.replica_rank != 0:
        return []
    mine = buffer[: unit_numel(unit, shards, mesh.shard_rank)].to(dtype)
    return [
        mine,
        *(
            mine.new_empty(unit_numel(unit, shards, other))
            for other in range(1, shards if mesh.rank == 0 else 1)
        ),
    ]


def _gather(parts: list[torch.Tensor], rank: int, group: dist.ProcessGroup | None) -> None:
    """Every rank's row buffer of a unit, into rank 0's `parts`; the others' have one, their own."""
    if rank != 0:
        if parts and parts[0].numel():
            dist.send(parts[0].view(torch.uint8), dst=0, group=group)
        return
    for other, part in enumerate(parts[1:], 1):
        if part.numel():
            dist.recv(part.view(torch.uint8), src=other, group=group)


def _write_unit(
    unit: UnitLayout, shards: int, parts: list[torch.Tensor], writer: WeightsWriter | None
) -> None:
    if writer is None:
        return
    for of_member in zip(*(unit_rows(unit, shards, rank) for rank in range(shards)), strict=True):
        for rows, part in zip(of_member, parts, strict=True):
            if rows.stop > rows.start:
                writer.write(part[rows.offset : rows.offset + rows.stop - rows.start])
