"""A unit: parameters that are gathered, used and reduced together. Here are its weights; its
gradients are in `fsdp/reduce.py`.

[Note: gathering under autograd] A parameter is a view of a gather buffer, and autograd saves it for
the backward. By then the buffer has held other units, and is filled with this one again: same
storage, same offset, same values, so the saved tensor is right. An in-place write normally raises
autograd's version error; the parameters are therefore made from the buffer's `.data`, whose version
counter is separate, and gathers write through the buffer itself. A unit must never move to another
buffer: what autograd saved would then silently read another unit's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from retool.parallel.fsdp.buffers import Buffer, Buffers
from retool.parallel.fsdp.layout import Layout, Slot, UnitLayout
from retool.parallel.fsdp.overlap import Overlap
from retool.parallel.fsdp.reduce import Gradients
from retool.parallel.mesh import Mesh
from retool.parallel.streams import record_event


class Unit:
    """One unit's parameters, and the state of their gather. Of a divided unit it is a rank's part.

    `slots` are those of the parameters. `shard` and `grad_shard`: this rank's part of what is
    gathered, and of the gradient.
    """

    def __init__(
        self,
        index: int,
        layout: UnitLayout,
        mesh: Mesh,
        overlap: Overlap,
        *,
        weights: Buffer,
        shard: torch.Tensor,
        grads: Buffer | None,
        grad_shard: torch.Tensor,
    ) -> None:
        self.index = index
        self.layout = layout
        self.overlap = overlap
        self.slots = layout.slots_of(mesh.shard_rank)
        self.group = group_of(layout, mesh)
        self.weights = weights
        self.shard = shard
        # Calls of its modules under way, one inside the other
        self.running = 0
        # Forwards with these weights whose backward hasn't ended
        self.open_uses = 0
        # Whether its weights were gathered for a backward since its last forward
        self.announced = False
        # Whether its next backward computes with them: that of an embedding doesn't
        self.needed_in_backward = True
        self.parameters = _views(self.slots, weights.data.data)
        self.gradients = Gradients(
            layout.part_numel,
            self.slots,
            self.parameters,
            overlap,
            self.group,
            shard=grad_shard,
            buffer=grads,
            replicas=mesh.replica_group,
            nearby=mesh.shards_nearby,
        )

    def start_gather(self) -> None:
        """Begin to fill the buffer, unless it holds this unit already, or another that is in use."""
        buffer = self.weights
        if buffer.holder == self.index or buffer.in_use or self.group is None:
            return
        # Gathered ahead for a unit that never ran, perhaps: its transfer still writes here
        if buffer.pending is not None:
            buffer.pending.wait()
        buffer.holder = self.index
        out = buffer.data[: self.layout.part_numel]
        buffer.pending = self.overlap.gather(out, self.shard, self.group, buffer.free)

    def gather(self) -> None:
        """Fill the buffer: the parameters can be used from here on."""
        if self.weights.in_use and self.weights.holder != self.index:
            # The end of that unit's use wasn't seen, but all of it is enqueued
            self._end_use()
        self.start_gather()
        self.weights.settle()

    def release(self) -> None:
        """What is enqueued so far is the last use for now: another unit may have the buffer."""
        # What isn't in use was released before, and what another unit uses is that unit's to release.
        # A second event would be later than the last use, and the next gather would wait for it.
        if self.weights.in_use and self.weights.holder in (self.index, None):
            self._end_use()

    def give_up(self) -> None:
        """No call of its modules is under way, also where one was interrupted and no hook ran."""
        self.running = 0
        self.release()

    def _end_use(self) -> None:
        self.weights.in_use = None
        # New weights are gathered after all that is enqueued: only other units have to wait for it
        if self.overlap.gather_stream is not None and self.weights.shared:
            self.weights.free = record_event()


def make_units(
    layout: Layout,
    mesh: Mesh,
    overlap: Overlap,
    *,
    compute: torch.Tensor,
    grad: torch.Tensor,
    weights: Buffers,
    grads: Buffers,
) -> list[Unit]:
    """All units of a layout. `compute` and `grad`: this rank's flat shards of what is gathered, and of
    the gradient.
    """
    units = list[Unit]()
    for index, unit in enumerate(layout.units):
        part = slice(unit.start, unit.start + unit.shard_numel)
        # Who owns all that is gathered computes with the shard itself
        gathered = weights.of.get(index) or Buffer(compute[part])
        made = Unit(
            index,
            unit,
            mesh,
            overlap,
            weights=gathered,
            shard=compute[part],
            grads=grads.of.get(index),
            grad_shard=grad[part],
        )
        units.append(made)
    return units


def group_of(layout: UnitLayout, mesh: Mesh) -> dist.ProcessGroup | None:
    """The ranks that own this rank's part of a unit together; None where it is one."""
    return mesh.part_group if layout.parts > 1 else mesh.shard_group


def _views(slots: Sequence[Slot], flat: torch.Tensor) -> list[nn.Parameter]:
    """The unit's parameters as views of its buffer."""
    parameters = []
    for slot in slots:
        view = flat[slot.offset : slot.offset + slot.numel].view(slot.shape)
        parameter = nn.Parameter(view, requires_grad=slot.trainable)
        # `collect` refuses to shard it once more: it is only a view
        parameter.gathered = True  # type: ignore[attr-defined]
        parameters.append(parameter)
    return parameters
