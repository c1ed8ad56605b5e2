"""The engine's own copy of the weights: whole units, gathered from the trainer's shards into the
same memory each time.

The decoder is the training one (`retool.model.decoder`), its parameters are views of these buffers.
As they never move, CUDA graphs recorded over them stay right when the weights change.

[Note: splitting over ranks] With n ranks of a tensor-parallel group each rank keeps all weights and
computes its part of a step's tokens, but keeps keys and values, and attends, for its part of the
heads only: Ulysses' two all-to-alls as in training. Any number of ranks up to that of the query
heads will do. Memory for KV and work are divided; memory for the weights isn't.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from retool.model.block import Execution
from retool.model.config import ModelConfig
from retool.model.decoder import Decoder
from retool.model.experts.routing import Watch
from retool.parallel.collectives import all_gather_flat
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.layout import Layout, Slot, UnitLayout
from retool.parallel.fsdp.unit import Unit
from retool.parallel.fsdp.whole import gather_whole
from retool.parallel.mesh import Mesh
from retool.parallel.ulysses import HeadPlan


def make_decoder(
    config: ModelConfig,
    device: torch.device,
    group: dist.ProcessGroup | None,
    compiled: bool,
    watch: Watch | None = None,
) -> Decoder:
    """The decoder on the meta device, with its heads split over `group`.

    Its parameters ask for gradients as the trainer's do, so that both share the compiled graph of
    `after`; the engine runs without.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    mesh = Mesh(rank, ranks, ranks, 1, device, sp_group=group)
    plan = HeadPlan(ranks, rank, config.heads, config.kv_heads, config.head_dim)
    with torch.device("meta"):
        return Decoder(config, Execution(plan, mesh, compiled=compiled, watch=watch))


class Weights:
    """The decoder, and the buffers that its parameters are views of. The first `sync` makes both."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype | None, device: torch.device) -> None:
        self.decoder = decoder
        self.dtype = dtype
        self.device = device
        self.buffers: list[torch.Tensor] = []

    def sync(self, sharded: Sharded) -> None:
        """Gather every unit of the trainer's compute weights once, in place. Collective on all ranks
        that share them.

        Raises ValueError if the trainer's model has other parameters than the engine's.
        """
        assert isinstance(sharded.module, Decoder)
        # Rounded where the trainer rounds: errors that both make cancel in part
        self.decoder.execution = replace(
            self.decoder.execution, fp32_residual=sharded.module.execution.fp32_residual
        )
        if not self.buffers:
            self._allocate(sharded.layout, self.dtype or sharded.param_dtype)
        group = sharded.mesh.shard_group
        for unit, buffer in zip(sharded.units, self.buffers, strict=True):
            if unit.layout.parts > 1:
                self._sync_divided(unit, buffer, sharded)
            elif group is None:
                buffer.copy_(unit.shard)
            else:
                # By way of the trainer's dtype: the sampler's weights are those that train, rounding included
                shard = unit.shard.to(sharded.param_dtype).to(buffer.dtype)
                all_gather_flat(buffer, shard, group=group)

    def _sync_divided(self, unit: Unit, buffer: torch.Tensor, sharded: Sharded) -> None:
        """All parts of experts that the trainer's ranks divide, by way of memory for them."""
        shard = unit.shard.to(sharded.param_dtype).to(buffer.dtype)
        whole = gather_whole(unit.layout, shard, sharded.mesh)
        for slot in unit.layout.slots:
            first = _first(unit.layout, slot) + slot.part * slot.numel
            buffer[first : first + slot.numel] = whole[slot.offset : slot.offset + slot.numel]

    def _allocate(self, layout: Layout, dtype: torch.dtype) -> None:
        """Make the buffers, and the parameters views of them."""
        slots = {
            slot.name: _whole_shape(unit, slot) for unit in layout.units for slot in unit.slots
        }
        mine = {name: tuple(p.shape) for name, p in self.decoder.named_parameters()}
        if slots != mine:
            names = ", ".join(sorted(set(slots) ^ set(mine))[:3]) or "shapes differ"
            raise ValueError(
                f"the weights are not of the engine's model ({names}): make the engine from the same "
                "config.json."
            )
        self.dtype = dtype
        for unit in layout.units:
            buffer = torch.empty(unit.numel, dtype=dtype, device=self.device)
            for slot in (slot for slot in unit.slots if slot.part == 0):
                first = _first(unit, slot)
                flat = buffer[first : first + slot.numel * unit.parts]
                whole = flat.view(_whole_shape(unit, slot))
                point(self.decoder, slot.name, whole, trained=True)
            self.buffers.append(buffer)


def point(model: nn.Module, name: str, view: torch.Tensor, trained: bool = False) -> None:
    """Make a parameter, and what is tied to it, a view of other memory."""
    path, _, leaf = name.rpartition(".")
    old = model.get_submodule(path)._parameters[leaf]
    new = nn.Parameter(view, requires_grad=trained)
    # Tied parameters are one object in two modules, and must be one view of the buffer too
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[key] = new


def _whole_shape(unit: UnitLayout, slot: Slot) -> tuple[int, ...]:
    """The shape of all parts of a slot."""
    return slot.shape[0] * unit.parts, *slot.shape[1:]


def _first(unit: UnitLayout, slot: Slot) -> int:
    """Where all parts of a slot begin in the engine's buffer of its unit, one behind the other."""
    return (slot.offset - slot.part * unit.part_numel) * unit.parts
