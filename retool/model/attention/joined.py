"""`attention` of q, k and v in one buffer, as ranks receive them; its gradient is one buffer, too.

Legend: T tokens · n query heads · k key/value heads · j = n + 2·k · H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retool.model.attention.dispatch import attention_backward, check, computed_or_kept
from retool.model.attention.pack import Attended, Pack
from retool.model.attention.parts import apart, together
from retool.model.compiling.hidden import applied, eager


@eager  # as `attention`
def joined_attention(
    heads_TjH: Tensor, kv_heads: int, pack: Pack, backend: str, saved: Attended | None = None
) -> Tensor:
    """out [T, n, H] of the n query heads and `kv_heads` each of k and v that lie behind them.

    The rest as in `attention`.
    """
    tokens, heads, _ = heads_TjH.shape
    check((tokens, heads - 2 * kv_heads), kv_heads, pack)
    return applied(_JoinedAttention, heads_TjH, kv_heads, pack, backend, saved)


class _JoinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        kv_heads: int,
        pack: Pack,
        backend: str,
        saved: Attended | None,
    ) -> Tensor:
        out, lse = computed_or_kept(apart(heads, kv_heads), pack, backend, saved)
        ctx.kv_heads = kv_heads
        ctx.pack = pack
        ctx.backend = backend
        ctx.save_for_backward(heads, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        heads, out, lse = ctx.saved_tensors
        parts = apart(heads, ctx.kv_heads)
        gradients = attention_backward(dout, *parts, (out, lse), ctx.pack, ctx.backend)
        return together(gradients), None, None, None, None
