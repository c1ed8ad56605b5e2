"""The whole weights of a sharded module, one unit after the other, for code that wants them by
name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from retool.parallel.collectives import all_gather_flat
from retool.parallel.fsdp.layout import UnitLayout
from retool.parallel.fsdp.sharded import Sharded
from retool.parallel.mesh import Mesh


def whole_units(sharded: Sharded) -> Iterator[tuple[UnitLayout, torch.Tensor]]:
    """Each unit's layout and its flat weights, in the dtype that the trainer computes in.

    Collective on all ranks that share the weights. Nobody holds more than one unit, if whoever
    asks keeps none. On one process they are the weights themselves, not a copy.
    """
    for unit, layout in zip(sharded.units, sharded.layout.units, strict=True):
        shard = unit.shard.detach().to(sharded.param_dtype)
        yield layout, gather_whole(layout, shard, sharded.mesh)


def gather_whole(layout: UnitLayout, shard: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """All of a unit, [layout.numel], from every rank's `shard` of it.

    A collective call of the ranks that share the parameters.
    """
    if mesh.shard_group is None:
        return shard
    whole = shard.new_empty(layout.numel)
    all_gather_flat(whole, shard, group=mesh.shard_group)
    if layout.parts == 1:
        return whole
    # Neighbouring ranks own different parts
    by_rank = whole.view(layout.owners, layout.parts, layout.shard_numel)
    return by_rank.transpose(0, 1).flatten()


def named(layout: UnitLayout, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The Hugging Face parameters of a unit: their names, and views of its flat weights."""
    pairs: list[tuple[str, torch.Tensor]] = []
    for member in layout.members:
        piece = flat[member.offset : member.offset + member.numel]
        pairs.append((member.name, piece.view(member.shape)))
    return pairs
