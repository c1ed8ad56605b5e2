"""A decoder block whose backward runs it again: kept are its input x, attention's result and
log-sum-exp, in long packs by chunk.

    forward    before → attention → after, chunk by chunk                                             (without a graph)
    backward   before → attention's kept result                                                       (with a graph)
               after and its backward, chunk by chunk → d_x, d_a, weight gradients
               backward of attention and before

`after` (o, norm, MLP) is local to a token, and its [t, 2F] is the largest activation there is.
Above `CHUNKED_FROM` tokens it exists for `CHUNK` of them at a time; the weights' gradients are
added up over chunks in at least fp32 and rounded once.

Nobody reads what `after` gives in a backward. Compiled on a GPU, an MLP's last product isn't computed
there, where the block only adds it to something (`result_wanted`).

Legend: t tokens of this rank · D model · E = query heads · head dim · F ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from retool.batch import PackedBatch
from retool.model.attention.pack import Attended
from retool.model.compiling.hidden import unviewed
from retool.model.offload import Offload

Recompute = Literal["none", "selective", "full", "offload"]

CHUNKED_FROM = 32_768  # tokens of a rank
CHUNK = 16_384
ROUND = 128  # chunks of this multiple keep matrix products on their fast path

Gradients = Sequence[Tensor | None]


class Block(Protocol):
    """What is used here of a `retool.model.block.Block`."""

    index: int
    after_is_local: bool
    result_wanted: bool
    before_piece: Callable[..., Tensor]
    after_piece: Callable[..., Tensor]

    def attend(
        self, sent: Tensor, t: int, batch: PackedBatch, saved: Attended | None = None
    ) -> Tensor: ...
    def attend_and_save(
        self, sent: Tensor, t: int, batch: PackedBatch
    ) -> tuple[Tensor, Attended]: ...
    def per_token(self, batch: PackedBatch) -> tuple[Tensor | None, ...]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def token_chunks(t: int) -> list[slice]:
    """Chunks of about equal size, at most `CHUNK` and a little; all tokens at once up to
    `CHUNKED_FROM`.
    """
    if t <= CHUNKED_FROM:
        return [slice(0, t)]
    # As few chunks as `CHUNK` allows, of about one size: a short last one would leave the device
    # half idle.
    size = -(-t // (-(-t // CHUNK) * ROUND)) * ROUND
    return [slice(i, min(i + size, t)) for i in range(0, t, size)]


def _chunks(block: Block, t: int) -> list[slice]:
    """`token_chunks`; one piece where `after` meets other ranks, which may have fewer tokens."""
    return token_chunks(t) if block.after_is_local else [slice(0, t)]


def recomputed(
    block: Block,
    x_tD: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: PackedBatch,
    offload: Offload | None,
) -> Tensor:
    """The block on [t, D] → [t, D]; what its backward finds waits in host memory with `offload`."""
    out: Any = _Recomputed.apply(block, batch, offload, x_tD, cos, sin, *block.parameters())
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        batch: PackedBatch,
        offload: Offload | None,
        x_tD: Tensor,
        cos: Tensor,
        sin: Tensor,
        *_: Tensor,
    ) -> Tensor:
        x = _plain(x_tD)
        sent = block.before_piece(block, x, cos, sin, batch.alone)
        a_tE, kernel = block.attend_and_save(sent, len(x), batch)
        ctx.block = block
        ctx.batch = batch
        ctx.parked = None
        if offload is None:
            ctx.save_for_backward(cos, sin, x_tD, *kernel)
        else:
            ctx.save_for_backward(cos, sin)
            ctx.parked = offload.park((x, *kernel), block.index)
        beside = block.per_token(batch)
        pieces = [
            block.after_piece(block, _plain(x[chunk]), _plain(a_tE[chunk]), *_part(beside, chunk))
            for chunk in _chunks(block, len(x))
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        cos, sin, *kept = ctx.saved_tensors
        x, out, lse = kept or ctx.parked.fetch()
        x = _plain(x).requires_grad_()
        # autograd runs a backward without a graph of its own. Here one is wanted, of this block
        # alone.
        with torch.enable_grad():
            sent = block.before_piece(block, x, cos, sin, ctx.batch.alone)
            # The kernel doesn't run again: its backward starts from what was kept.
            a_tE = block.attend(sent, len(x), ctx.batch, (out, lse))
        # `after` first: its gradient by attention's result is what the backward of attention starts
        # with.
        d_x, d_a, after = _after_backward(block, x, a_tE, d_out, block.per_token(ctx.batch))
        d_x_before, *before = torch.autograd.grad(
            a_tE, [x, *_trainable(block)], d_a, allow_unused=True
        )
        # A weight is in one of the two
        found = iter([b if a is None else a for a, b in zip(after, before, strict=True)])
        return (
            None,
            None,
            None,
            d_x + d_x_before,
            None,
            None,
            *(next(found) if p.requires_grad else None for p in block.parameters()),
        )


def _plain(x: Tensor) -> Tensor:
    """`unviewed`, without a history."""
    with torch.no_grad():
        return unviewed(x)


def _part(beside: Sequence[Tensor | None], chunk: slice) -> list[Tensor | None]:
    return [None if tensor is None else tensor[chunk] for tensor in beside]


def _trainable(block: Block) -> list[Tensor]:
    return [p for p in block.parameters() if p.requires_grad]


@contextmanager
def _result_unread(block: Block) -> Iterator[None]:
    """What `after` gives meanwhile is only the end of a graph."""
    block.result_wanted = False
    try:
        yield
    finally:
        block.result_wanted = True


def _after_backward(
    block: Block, x_tD: Tensor, a_tE: Tensor, d_out: Tensor, beside: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Gradients]:
    """Run `after` again with a graph: gradients of x, of attention's result, and of the block's
    trainable weights (None: not in it).
    """
    weights = _trainable(block)
    chunks = _chunks(block, len(x_tD))
    d_x = list[Tensor]()
    d_a = list[Tensor]()
    sums: Gradients = []
    for chunk in chunks:
        x = _plain(x_tD[chunk]).requires_grad_()
        a = _plain(a_tE[chunk]).requires_grad_()
        with torch.enable_grad(), _result_unread(block):
            y = block.after_piece(block, x, a, *_part(beside, chunk))
        d_xc, d_ac, *grads = torch.autograd.grad(
            y, [x, a, *weights], d_out[chunk], allow_unused=True
        )
        d_x.append(d_xc)
        d_a.append(d_ac)
        sums = _added(sums, grads) if len(chunks) > 1 else grads
    if len(chunks) == 1:
        return d_x[0], d_a[0], sums
    return (
        torch.cat(d_x),
        torch.cat(d_a),
        [None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True)],
    )


def _added(sums: Gradients, grads: Gradients) -> Gradients:
    """`sums` with `grads` added, in at least fp32."""
    if not sums:
        return [
            None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads
        ]
    return [None if s is None or g is None else s.add_(g) for s, g in zip(sums, grads, strict=True)]
