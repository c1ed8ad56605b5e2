"""Hugging Face weights out of the ranks' row buffers, one unit at a time: nobody holds the whole model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from retool.checkpoint.rows import unit_rows
from retool.checkpoint.safetensors import WeightsWriter
from retool.parallel.fsdp.layout import Layout, UnitLayout
from retool.parallel.mesh import Mesh


def export_weights(
    layout: Layout, mesh: Mesh, buffer: torch.Tensor, folder: Path, group: dist.ProcessGroup | None, trouble: list[Exception],
    dtype: torch.dtype = torch.bfloat16,
) -> list[Path]:  # fmt: skip
    """Rank 0 writes `folder`'s safetensors from every rank's rows of everything; returns the files (rank 0 only).

    A collective call over `group` (gloo) that all ranks go through to the end: rank 0 puts what goes wrong into `trouble` instead
    of leaving the others waiting. Tied names are left out: Hugging Face restores them from the config.
    """
    if mesh.replica_rank != 0:
        return []
    writer = None
    try:
        if mesh.rank == 0:
            writer = WeightsWriter(folder, {m.name: m.shape for unit in layout.units for m in unit.members}, dtype)
    except OSError as error:
        trouble.append(error)
    at = 0
    for unit in layout.units:
        mine = sum(r.stop - r.start for r in unit_rows(unit, layout.shards, mesh.shard_rank))
        parts = _gather(unit, layout.shards, mesh, buffer[at : at + mine].to(dtype), group)
        at += mine
        if writer is not None and not trouble:
            try:
                _write_unit(unit, layout.shards, parts, writer)
            except OSError as error:
                trouble.append(error)
    if writer is None:
        return []
    try:
        writer.abandon() if trouble else writer.close()
    except OSError as error:
        trouble.append(error)
    return writer.files


def _gather(unit: UnitLayout, shards: int, mesh: Mesh, mine: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Every rank's row buffer of a unit, on rank 0."""
    if mesh.rank != 0:
        if mine.numel():
            dist.send(mine.view(torch.uint8), dst=0, group=group)
        return []
    parts = [mine]
    for rank in range(1, shards):
        part = mine.new_empty(sum(r.stop - r.start for r in unit_rows(unit, shards, rank)))
        if part.numel():
            dist.recv(part.view(torch.uint8), src=rank, group=group)
        parts.append(part)
    return parts


def _write_unit(unit: UnitLayout, shards: int, parts: list[torch.Tensor], writer: WeightsWriter) -> None:
    for of_member in zip(*(unit_rows(unit, shards, rank) for rank in range(shards)), strict=True):
        for rows, part in zip(of_member, parts, strict=True):
            if rows.stop > rows.start:
                writer.write(part[rows.offset : rows.offset + rows.stop - rows.start])
