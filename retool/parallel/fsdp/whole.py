"""A sharded module's whole weights, one unit after the other: for who wants them by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from retool.parallel.collectives import all_gather_flat
from retool.parallel.fsdp.layout import UnitLayout
from retool.parallel.fsdp.sharded import Sharded


def whole_units(sharded: Sharded) -> Iterator[tuple[UnitLayout, torch.Tensor]]:
    """Each unit's layout and its flat weights, in the dtype that the trainer computes in.

    Collective on all ranks that share the weights. Nobody holds more than one unit, if whoever
    asks keeps none. On one process they are the weights themselves, not a copy.
    """
    group = sharded.mesh.shard_group
    for unit, layout in zip(sharded.units, sharded.layout.units, strict=True):
        whole = unit.shard.detach().to(sharded.param_dtype)
        if group is not None:
            shard = whole
            whole = shard.new_empty(layout.numel)
            all_gather_flat(whole, shard, group=group)
        yield layout, whole


def named(layout: UnitLayout, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The Hugging Face parameters of a unit: their names, and views of its flat weights."""
    pairs: list[tuple[str, torch.Tensor]] = []
    for member in layout.members:
        piece = flat[member.offset : member.offset + member.numel]
        pairs.append((member.name, piece.view(member.shape)))
    return pairs
