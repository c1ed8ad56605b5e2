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
from retool.parallel.agreement import all_or_none
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

    A collective call over `group` (gloo, all ranks). `GivenUp` on all ranks where one can't go on:
    they agree before every exchange. Tied names are left out: Hugging Face restores them from the
    config.
    """
    rank = mesh.rank
    shapes = {member.name: member.shape for unit in layout.units for member in unit.members}

    def open_writer() -> WeightsWriter | None:
        return WeightsWriter(folder, shapes, dtype) if rank == 0 else None

    writer = all_or_none(rank, group, open_writer)
    try:
        at = 0
        for unit in layout.units:
            prepare = partial(_prepare, unit, layout.shards, mesh, buffer[at:], dtype)
            parts = all_or_none(rank, group, prepare)
            _gather(parts, rank, group)
            all_or_none(rank, group, partial(_write_unit, unit, layout.shards, parts, writer))
            at += unit_numel(unit, layout.shards, mesh.shard_rank)
        all_or_none(rank, group, lambda: writer.close() if writer is not None else None)
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
    # Replicas hold the same rows, and those of the first are written
    if mesh.replica_rank != 0:
        return []
    mine = buffer[: unit_numel(unit, shards, mesh.shard_rank)].to(dtype)
    if mesh.rank != 0:
        return [mine]
    others = (unit_numel(unit, shards, other) for other in range(1, shards))
    return [mine, *(mine.new_empty(numel) for numel in others)]


def _gather(parts: list[torch.Tensor], rank: int, group: dist.ProcessGroup | None) -> None:
    """Collect every rank's row buffer of a unit in rank 0's `parts`. On other ranks `parts` has one
    entry, their own.
    """
    if rank != 0:
        if parts and parts[0].numel():
            # As bytes: gloo doesn't know every dtype.
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
    rows_by_rank = [unit_rows(unit, shards, rank) for rank in range(shards)]
    # A parameter is complete when every rank's rows of it follow each other, rank by rank.
    for rows_of_member in zip(*rows_by_rank, strict=True):
        for rows, part in zip(rows_of_member, parts, strict=True):
            numel = rows.stop - rows.start
            if numel:
                writer.write(part[rows.offset : rows.offset + numel])
