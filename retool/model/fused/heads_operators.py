# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false
"""`heads.turned` as an operator that the compiler looks into: a Triton kernel, which is its own backward
with the angles turned round.

Legend: t tokens of this rank · J heads · H head dim · C = H / 2 pairs of channels (i, i + C).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_autograd, triton_op, wrap_triton

PAIRS = 1024  # of a program
WARPS = 4


@triton.jit
def _turned_heads(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    J: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A token's HEADS heads, with CHANNELS ≥ C of their pairs; a row's start may exceed 32 bits."""
    parts: tl.constexpr = tl.cdiv(J, HEADS)
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    head = (program % parts) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, CHANNELS)
    exists = channel < C
    inside = (head < J)[:, None] & exists[None, :]
    place = row * (J * 2 * C) + head[:, None] * (2 * C) + channel[None, :]
    first = tl.load(heads_ptr + place, inside, other=0.0).to(tl.float32)
    second = tl.load(heads_ptr + place + C, inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * C + channel, exists, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * C + channel, exists, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    turns = (head < COUNT)[:, None]
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + place, tl.where(turns, first * cos - second * sin, first).to(kind), inside)
    tl.store(
        out_ptr + place + C, tl.where(turns, second * cos + first * sin, second).to(kind), inside
    )


@triton_op("retool::turned_heads", mutates_args=())
def turned_heads(
    heads_tJH: Tensor,
    cos_tC: Tensor,
    sin_tC: Tensor,
    count: int,
    back: bool,
) -> Tensor:
    """`heads.turned`; `back`: the other way round."""
    heads_tJH = heads_tJH.contiguous()
    out = torch.empty_like(heads_tJH)
    t, heads, dim = heads_tJH.shape
    pairs = dim // 2
    channels = triton.next_power_of_2(pairs)
    together = min(triton.next_power_of_2(heads), max(1, PAIRS // channels))
    wrap_triton(_turned_heads)[(t * triton.cdiv(heads, together),)](
        heads_tJH,
        cos_tC.contiguous(),
        sin_tC.contiguous(),
        out,
        J=heads,
        C=pairs,
        COUNT=count,
        BACK=back,
        HEADS=together,
        CHANNELS=channels,
        num_warps=WARPS,
    )
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, cos_tC, sin_tC, count, back = inputs
    ctx.save_for_backward(cos_tC, sin_tC)
    ctx.count = count
    ctx.back = back


def _backward(ctx: Any, d_out_tJH: Tensor) -> tuple[Tensor | None, ...]:
    cos_tC, sin_tC = ctx.saved_tensors
    d_heads_tJH = turned_heads(d_out_tJH, cos_tC, sin_tC, ctx.count, not ctx.back)
    return d_heads_tJH, None, None, None, None


register_autograd("retool::turned_heads", _backward, setup_context=_keep)
