"""Where gradients are reduced: from autograd's `.grad` to this rank's shard of the global sum.

    p.grad of a unit's parameters ──copied, one kernel──▶ flat buffer ──reduce-scatter, SUM──▶ shard += part
    in bf16 or fp16, one machine                         flat buffer ──each part to its rank──▶ shard += Σ parts
    with replicas (HSDP), once a step                                                          all-reduce, SUM

Nothing is averaged: the loss is a sum over tokens that was divided by the global count before.
With `hold` the gradients of several backwards are first added up on this rank, in a buffer of their
own, and sent once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from retool.parallel.fsdp.buffers import Buffer
from retool.parallel.fsdp.layout import Slot
from retool.parallel.fsdp.overlap import Overlap, Pending

Pair = tuple[torch.Tensor, torch.Tensor]  # where a gradient goes, the gradient


class Gradients:
    """The gradients of one unit: `slots` in a flat buffer of `numel` elements.

    `shard`: this rank's part of the sum over all ranks and all backwards of an optimizer step.
    `buffer`: what the unit's gradients are sent from, in the dtype of the reduction; None where
    there is nobody to send them to. `replicas`: the ranks that have the same shard. `nearby`: those of
    the group are on one machine.
    """

    def __init__(
        self,
        numel: int,
        slots: Sequence[Slot],
        parameters: list[nn.Parameter],
        overlap: Overlap,
        group: dist.ProcessGroup | None,
        *,
        shard: torch.Tensor,
        buffer: Buffer | None,
        replicas: dist.ProcessGroup | None,
        nearby: bool,
    ) -> None:
        self.numel = numel
        self.slots = slots
        self.parameters = parameters
        self.overlap = overlap
        self.group = group
        self.shard = shard
        self.buffer = buffer
        self.narrow = _narrow(parameters, buffer) if nearby else None
        self.replicas = replicas
        # Whether `shard` was added up over them, or is on the way
        self.complete = False
        # The last reduction over the ranks, and the sum over the replicas
        self.sending: Pending | None = None
        self.adding: Pending | None = None
        # The sum of several backwards, the whole unit's and only this rank's. Made when first
        # needed; `holds` says whether there is anything in it.
        self.held: Buffer | None = None
        self.holds = False
        self.places: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def arrived(self) -> bool:
        """Whether autograd has left gradients that weren't taken yet."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def forget(self) -> None:
        """Drop what wasn't reduced; what is being reduced comes before what follows."""
        self._take()
        self.holds = False
        self.wait()
        self.complete = False

    def reduce(self, hold: bool = False, wide: bool = False) -> None:
        """Start to sum the gradients over the ranks that share the parameters.

        With `hold` they are only added up here, until a call without it. `wide`: they leave in the
        dtype of the reduction. One process adds them to its shard.
        """
        grads = self._take()
        if self.buffer is None or self.group is None:
            _add(self._pairs(self.shard, grads))
            return
        if self.held is not None and not hold and not self.holds:
            # A unit that is used again: what was held may still be on its way to the same shard, and
            # `sending` knows of one reduction
            self.held.settle()
        if self.narrow is not None and not hold and not wide and not self.holds:
            self._send_narrow(grads, self.buffer, self.narrow, self.group)
            return
        buffer = self._collect(grads, self.buffer, hold)
        self.holds = hold
        if not hold:
            self._send(buffer, self.buffer, self.group)

    def complete_sum(self) -> None:
        """Start to add the shard up over the replicas, unless that was done: nothing may come after."""
        if self.complete:
            return
        self.complete = True
        if self.sending is None:
            self._add_up()
        else:
            self.sending.follow_with(self._add_up)

    def _add_up(self) -> None:
        if self.replicas is not None:
            self.adding = self.overlap.add_up(self.shard, self.replicas)

    def settle(self) -> None:
        """Order what follows after this unit's reduction."""
        for buffer in (self.buffer, self.held):
            if buffer is not None:
                buffer.settle()

    def wait(self) -> None:
        """The same, and after its sum over the replicas, if that was started."""
        self.settle()
        if self.adding is not None:
            self.adding.wait()
            self.adding = None

    def _take(self) -> list[torch.Tensor | None]:
        """The gradients, which the parameters no longer have: the next backward starts anew."""
        grads = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return grads

    def _collect(self, grads: list[torch.Tensor | None], buffer: Buffer, hold: bool) -> Buffer:
        """Put the gradients into a buffer of the whole unit, or add them to what it holds."""
        if hold and self.held is None:
            self.held = self._make_held(buffer.data)
        # The first backward after `no_sync` is added to those inside it, and sent with them
        if self.held is not None and (hold or self.holds):
            buffer = self.held
        flat = buffer.data[: self.numel]
        if self.holds:
            _add(self._pairs(flat, grads))
            return buffer
        # The last reduction may still read what it was given
        buffer.settle()
        self._fill(flat, grads)
        return buffer

    def _fill(self, flat: torch.Tensor, grads: list[torch.Tensor | None]) -> None:
        for start, stop in self._untouched(grads):
            flat[start:stop].zero_()
        _copy(self._pairs(flat, grads))

    def _send_narrow(
        self,
        grads: list[torch.Tensor | None],
        buffer: Buffer,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> None:
        """Start the reduction of gradients as they are: what is wide is their sum."""
        buffer.settle()
        # Memory for the unit in the wide dtype has room for what leaves and for what comes
        room = buffer.data.view(dtype)
        flat, received = room[: 2 * self.numel].split(self.numel)
        self._fill(flat, grads)
        self.sending = self.overlap.reduce_parts(flat, received, self.shard, group)
        buffer.pending = self.sending

    def _make_held(self, like: torch.Tensor) -> Buffer:
        # At least fp32: in bf16 the sum of many micro-batches stops growing
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Buffer(torch.zeros(self.numel, dtype=dtype, device=like.device))

    def _send(self, buffer: Buffer, sent_from: Buffer, group: dist.ProcessGroup) -> None:
        """Start the reduction of what is in `buffer`, in the dtype of `sent_from`."""
        flat = buffer.data[: self.numel]
        # Held in fp32, sent in less: the sum is rounded once, at its end
        if buffer.data.dtype != sent_from.data.dtype:
            sent_from.settle()
            wide = flat
            flat = sent_from.data[: self.numel]
            flat.copy_(wide)
            buffer = sent_from
        self.sending = self.overlap.reduce(flat, self.shard, group)
        buffer.pending = self.sending

    def _pairs(self, flat: torch.Tensor, grads: list[torch.Tensor | None]) -> list[Pair]:
        """Each gradient with its place in the unit's flat buffer."""
        places = self._places_in(flat)
        return [(p, grad) for p, grad in zip(places, grads, strict=True) if grad is not None]

    def _places_in(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a buffer, one for each parameter. Buffers are few and stay where they are: the views
        are made once.
        """
        where = (flat.data_ptr(), flat.dtype)
        if where not in self.places:
            self.places[where] = [
                flat[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.slots
            ]
        return self.places[where]

    def _untouched(self, grads: list[torch.Tensor | None]) -> list[tuple[int, int]]:
        """Stretches of padding, and of what this backward didn't reach: they must count as zero."""
        gaps = []
        end = 0
        for slot, grad in zip(self.slots, grads, strict=True):
            if grad is not None:
                gaps.append((end, slot.offset))
                end = slot.offset + slot.numel
        gaps.append((end, self.numel))
        return [(start, stop) for start, stop in gaps if start < stop]


def _narrow(parameters: list[nn.Parameter], buffer: Buffer | None) -> torch.dtype | None:
    """The dtype of gradients that are half as wide as what they are reduced in, else None."""
    if buffer is None or not parameters:
        return None
    dtype = parameters[0].dtype
    half = 2 * dtype.itemsize == buffer.data.itemsize
    return dtype if half and buffer.data.dtype == torch.float32 else None


def _copy(pairs: list[Pair]) -> None:
    """One kernel for all tensors of a unit, cast included: a kernel each would cost the host more
    than the device.
    """
    if pairs:
        torch.ops.aten._foreach_copy_([place for place, _ in pairs], [grad for _, grad in pairs])


def _add(pairs: list[Pair]) -> None:
    for place, grad in pairs:
        place.add_(grad)
