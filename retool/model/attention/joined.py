"""`attention` of q, k and v in one buffer, as ranks receive them; its gradient is one buffer, too.

Legend: T tokens · n query heads · k key/value heads · j = n + 2·k · H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retool.model.attention.dispatch import attention_backward, check, computed_or_kept
from retool.model.attention.parts import apart, together
from retool.model.compile import applied, eager


@eager  # as `attention`
def joined_attention(
    heads_TjH: Tensor,
    kv_heads: int,
    saved: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    seqlens: tuple[int, ...],
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """out [T, n, H] of the n query heads and `kv_heads` each of k and v that lie behind them.

    `saved`: (out, lse), where they are known, as in `attention_from_saved`. The rest as in `attention`.
    """
    tokens, heads, _ = heads_TjH.shape
    check((tokens, heads - 2 * kv_heads), kv_heads, seqlens)
    out, lse = (None, None) if saved is None else saved
    pack = (cu_seqlens, max_seqlen, backend, seqlens, window, cap)
    return applied(_JoinedAttention, heads_TjH, kv_heads, out, lse, *pack)


class _JoinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        kv_heads: int,
        out: Tensor | None,
        lse: Tensor | None,
        *pack: Any,
    ) -> Tensor:
        out, lse = computed_or_kept(apart(heads, kv_heads), out, lse, pack)
        cu_seqlens, *ctx.pack = pack
        ctx.kv_heads = kv_heads
        ctx.save_for_backward(heads, out, lse, cu_seqlens)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        heads, *rest = ctx.saved_tensors
        grads = attention_backward(dout, *apart(heads, ctx.kv_heads), *rest, *ctx.pack)
        return (together(grads), *[None] * 9)
