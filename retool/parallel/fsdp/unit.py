"""A unit: what is gathered, used and reduced at once.

[Note: gathering under autograd] A parameter is a view of a gather buffer, and autograd saves it for
the backward. By then the buffer has held other units, and is filled with this one again: same
storage, same offset, same values, so the saved tensor is right. An in-place write normally raises
autograd's version error; the parameters are therefore made from the buffer's `.data`, whose version
counter is separate, and gathers write through the buffer itself. A unit must never move to another
buffer: what autograd saved would then silently read another unit's weights.
"""

from __future__ import annotations

import torch
from torch import nn

from retool.parallel.fsdp.layout import UnitLayout
from retool.parallel.fsdp.overlap import Buffer, Overlap, recorded
from retool.parallel.mesh import Mesh


class Unit:
    """One unit's parameters, its shard, and the state of its gather and reduction."""

    def __init__(
        self,
        index: int,
        layout: UnitLayout,
        mesh: Mesh,
        overlap: Overlap,
        weights: Buffer,
        grads: Buffer | None,
    ) -> None:
        self.index = index
        self.layout = layout
        self.mesh = mesh
        self.overlap = overlap
        self.weights = weights
        self.grads = grads
        # This rank's part of what is gathered, and of the gradient, set by `shard`
        self.shard = self.grad_shard = torch.empty(0)
        self.held: Buffer | None = (
            None  # gradients of several backwards, the whole unit's; `holds`: it has some
        )
        self.holds = False
        self.announced = False  # its weights were gathered for a backward since its last forward
        flat = weights.data.data
        self.parameters = [
            nn.Parameter(
                flat[s.offset : s.offset + s.numel].view(s.shape), requires_grad=s.trainable
            )
            for s in layout.slots
        ]
        for parameter in self.parameters:
            parameter.gathered = True  # type: ignore[attr-defined]  # not to be sharded once more: it's only a view

    def start_gather(self) -> None:
        """Begin to fill the buffer, unless it holds this unit already, or another that is in use."""
        buffer = self.weights
        if buffer.holder == self.index or buffer.in_use or self.mesh.shard_group is None:
            return
        if buffer.pending is not None:
            buffer.pending.wait()
        buffer.holder = self.index
        buffer.pending = self.overlap.gather(
            buffer.data[: self.layout.numel], self.shard, self.mesh.shard_group, buffer.free
        )

    def gather(self) -> None:
        """The parameters can be used from here on.

        What used the buffer last has been enqueued, even if its end wasn't seen.
        """
        if self.weights.in_use and self.weights.holder != self.index:
            self.release()
        self.start_gather()
        settle(self.weights)

    def release(self) -> None:
        """What was enqueued so far is the last use for now: the buffer may be given to another
        unit.
        """
        self.weights.in_use = None
        if self.overlap.gather_stream is not None and self.mesh.shard_group is not None:
            self.weights.free = recorded()

    def forget_gradients(self) -> None:
        """Drop what wasn't reduced; what is being reduced comes before what follows."""
        for parameter in self.parameters:
            parameter.grad = None
        self.holds = False
        self.wait_reduced()

    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def reduce(self, hold: bool = False) -> None:
        """Start to sum the gradients over the ranks that share the parameters, in the reduction's
        dtype.

        With `hold` they are only added up here, in at least fp32, in a buffer of the whole unit
        that is made when first needed, until a call without it. One process adds them to its shard.
        A unit's gradients move together: a kernel each would cost the host more than the device.
        """
        grads = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if self.grads is None or self.mesh.shard_group is None:
            _add(
                [(self._part(self.grad_shard, i), g) for i, g in enumerate(grads) if g is not None]
            )
            return
        if self.held is None and hold:
            # Sums of many micro-batches stall in bf16
            wide = torch.promote_types(self.grads.data.dtype, torch.float32)
            self.held = Buffer(
                torch.zeros(self.layout.numel, dtype=wide, device=self.grads.data.device)
            )
        buffer = self.held if self.held is not None and (hold or self.holds) else self.grads
        flat = buffer.data[: self.layout.numel]
        if self.holds:
            _add([(self._part(flat, i), g) for i, g in enumerate(grads) if g is not None])
        else:
            settle(buffer)
            for start, stop in self._untouched(grads):
                flat[start:stop].zero_()
            _copy([(self._part(flat, i), g) for i, g in enumerate(grads) if g is not None])
        self.holds = hold
        if hold:
            return
        if buffer.data.dtype != self.grads.data.dtype:
            settle(self.grads)
            buffer = self.grads
            wide = flat
            flat = buffer.data[: self.layout.numel]
            flat.copy_(wide)
        buffer.pending = self.overlap.reduce(flat, self.grad_shard, self.mesh.shard_group)

    def wait_reduced(self) -> None:
        """Order what follows after this unit's reduction."""
        for buffer in (self.grads, self.held):
            if buffer is not None:
                settle(buffer)

    def _part(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        slot = self.layout.slots[number]
        return flat[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def _untouched(self, grads: list[torch.Tensor | None]) -> list[tuple[int, int]]:
        """Padding, and what this backward didn't reach: it must count as zero."""
        out = []
        end = 0
        for slot, grad in zip(self.layout.slots, grads, strict=True):
            if grad is not None:
                out.append((end, slot.offset))
                end = slot.offset + slot.numel
        return [(a, b) for a, b in [*out, (end, self.layout.numel)] if a < b]


def settle(buffer: Buffer) -> None:
    """What comes next comes after what is under way in the buffer: its gather, or the reduction
    that reads it.
    """
    if buffer.pending is not None:
        buffer.pending.wait()
        buffer.pending = None


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """One kernel for all tensors of a unit, cast included."""
    if pairs:
        torch.ops.aten._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


def _add(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, grad in pairs:
        target.add_(grad)
