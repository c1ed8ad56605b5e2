"""A unit: what is gathered, used and reduced at once.

[Note: gathering under autograd] A parameter is a view of a gather buffer, and autograd saves it for the backward. By then
the buffer has held other units, and is filled with this one again: same storage, same offset, same values, so the saved
tensor is right. An in-place write normally raises autograd's version error; the parameters are therefore made from the
buffer's `.data`, whose version counter is separate, and gathers write through the buffer itself. A unit must never move to
another buffer: what autograd saved would then silently read another unit's weights.
"""

from __future__ import annotations

import torch
from torch import nn

from retool.parallel.fsdp.layout import UnitLayout
from retool.parallel.fsdp.overlap import Buffer, Overlap, recorded
from retool.parallel.mesh import Mesh


class Unit:
    """One unit's parameters, its shard, and the state of its gather and reduction."""

    def __init__(self, index: int, layout: UnitLayout, mesh: Mesh, overlap: Overlap, weights: Buffer, grads: Buffer | None) -> None:
        self.index, self.layout, self.mesh, self.overlap = index, layout, mesh, overlap
        self.weights, self.grads = weights, grads
        self.shard = self.grad_shard = torch.empty(0)  # this rank's part in the compute and the reduce dtype, set by `shard`
        self.written: set[int] = set()
        flat = weights.data.data
        self.parameters = [
            nn.Parameter(flat[s.offset : s.offset + s.numel].view(s.shape), requires_grad=s.trainable) for s in layout.slots
        ]
        for number, parameter in enumerate(self.parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, n=number: self._take_gradient(n, p))

    def start_gather(self) -> None:
        """Begin to fill the buffer, unless it holds this unit already."""
        buffer = self.weights
        if buffer.holder == self.index or self.mesh.shard_group is None:
            return
        if buffer.pending is not None:
            buffer.pending.wait()
        buffer.holder = self.index
        buffer.pending = self.overlap.gather(buffer.data[: self.layout.numel], self.shard, self.mesh.shard_group, buffer.free)

    def gather(self) -> None:
        """The parameters can be used from here on."""
        self.start_gather()
        if self.weights.pending is not None:
            self.weights.pending.wait()
            self.weights.pending = None

    def release(self) -> None:
        """What was enqueued so far is the last use for now: the buffer may be given to another unit."""
        if self.mesh.device.type == "cuda" and self.mesh.shard_group is not None:
            self.weights.free = recorded()

    def _take_gradient(self, number: int, parameter: torch.Tensor) -> None:
        """Move a finished gradient to the flat buffer (one process: add it to the shard) in the reduction's dtype."""
        slot, grad = self.layout.slots[number], parameter.grad
        assert grad is not None
        parameter.grad = None
        if self.grads is None:
            self.grad_shard[slot.offset : slot.offset + slot.numel].add_(grad.reshape(-1))
            return
        self._own_gradient_buffer()
        target = self.grads.data[slot.offset : slot.offset + slot.numel]
        target.add_(grad.reshape(-1)) if number in self.written else target.copy_(grad.reshape(-1))
        self.written.add(number)

    def _own_gradient_buffer(self) -> None:
        """Take the gradient buffer over from the unit before, once its reduction has read it."""
        assert self.grads is not None
        if self.grads.holder != self.index:
            if self.grads.pending is not None:
                self.grads.pending.wait()
                self.grads.pending = None
            self.grads.holder = self.index
            self.written.clear()

    def reduce(self) -> None:
        """Sum the gradients over the ranks that share the parameters; it starts now and runs beside what follows."""
        if self.grads is None or self.mesh.shard_group is None or not self.layout.slots:
            return
        self._own_gradient_buffer()
        end = 0
        for number, slot in enumerate(self.layout.slots):  # padding, and what this backward didn't reach, counts as zero
            self.grads.data[end : slot.offset].zero_()
            end = slot.offset + slot.numel
            if number not in self.written:
                self.grads.data[slot.offset : end].zero_()
        self.grads.data[end : self.layout.numel].zero_()
        self.written.clear()
        self.grads.pending = self.overlap.reduce(self.grads.data[: self.layout.numel], self.grad_shard, self.mesh.shard_group)
        self.grads.holder = None
