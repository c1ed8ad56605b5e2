"""Causal attention document by document, in float32, float64 or bfloat16, on any device.

Shapes: T tokens · N query heads · K key/value heads · G query heads per key/value head
· L tokens of a document · H head dim · B documents

On the CPU it runs torch's blocked kernel (memory linear in L, exact in float64, about six times as
fast as writing the formula down). Elsewhere it is the formula, over blocks of queries so that no
more than `SCORE_BUDGET` scores exist at a time.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

SCORE_BUDGET = 1 << 26  # elements of a block of scores

Gradients = tuple[Tensor, Tensor, Tensor]


class Pack(NamedTuple):
    """Where the documents lie: `cu_seqlens` int32 [B+1] on the device, the rest on the host."""

    cu_seqlens: Tensor
    max_seqlen: int
    seqlens: tuple[int, ...]


def reference_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """q [T, N, H], k and v [T, K, H] → out [T, N, H] in q's dtype, and its log-sum-exp [N, T].

    The log-sum-exp is float64 for float64 inputs, else float32.
    """
    document = _cpu_forward if q.device.type == "cpu" else plain_forward
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=_score_dtype(q))
    for tokens in _documents(pack.seqlens):
        out[tokens], lse[:, tokens] = document(q[tokens], k[tokens], v[tokens])
    return out, lse


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack
) -> Gradients:
    """(dq, dk, dv) in the dtypes of q, k, v."""
    document = _cpu_backward if q.device.type == "cpu" else plain_backward
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    for tokens in _documents(pack.seqlens):
        dq[tokens], dk[tokens], dv[tokens] = document(
            dout[tokens], q[tokens], k[tokens], v[tokens], out[tokens], lse[:, tokens]
        )
    return dq, dk, dv


def _documents(seqlens: tuple[int, ...]) -> list[slice]:
    """Where each document's tokens are."""
    return [slice(end - n, end) for end, n in zip(accumulate(seqlens), seqlens, strict=True)]


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# --- torch's blocked CPU kernel: [1, N, L, H], as many key/value heads as query heads ---


def _batched(x_LNH: Tensor) -> Tensor:
    return x_LNH.transpose(0, 1)[None]


def _expanded(x_LKH: Tensor, heads: int) -> Tensor:
    """A key/value head for each of `heads` query heads."""
    return _batched(x_LKH.repeat_interleave(heads // x_LKH.shape[1], 1))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _batched(q), _expanded(k, heads), _expanded(v, heads), 0.0, True
    )
    return out[0].transpose(0, 1), lse[0]


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    heads = q.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _batched(dout),
        _batched(q),
        _expanded(k, heads),
        _expanded(v, heads),
        _batched(out),
        lse[None].contiguous(),
        0.0,
        True,
    )
    group = heads // k.shape[1]
    # Query heads share a key: their gradients add up in the scores' dtype, rounded once
    dk = _summed_over_groups(dk[0], group, lse.dtype)
    dv = _summed_over_groups(dv[0], group, lse.dtype)
    return dq[0].transpose(0, 1), dk, dv


def _summed_over_groups(gradient_NLH: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """A gradient for each query head → one for each key/value head [L, K, H]."""
    return gradient_NLH.unflatten(0, (-1, group)).sum(1, dtype=dtype).transpose(0, 1)


# --- the formula ---


def _blocks(length: int, heads: int) -> list[slice]:
    """Rows of queries whose scores against all keys are within the budget."""
    rows = max(1, SCORE_BUDGET // (heads * length))
    return [slice(i, min(i + rows, length)) for i in range(0, length, rows)]


def _grouped(x_LNH: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[L, N, H] → [K, G, L, H]"""
    return x_LNH.to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_KGLH: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, G, L, H] → [L, N, H]"""
    return x_KGLH.permute(2, 0, 1, 3).flatten(1, 2).to(dtype)


def _scores(q_KGLH: Tensor, k_K1LH: Tensor, rows: slice) -> Tensor:
    """Scaled scores [K, G, rows, keys up to the last row], with -inf above the diagonal."""
    scale = q_KGLH.shape[-1] ** -0.5
    scores = q_KGLH[:, :, rows] @ k_K1LH[:, :, : rows.stop].transpose(-1, -2) * scale
    # Keys count from 0, these queries from `rows.start`
    square = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    future = square.triu_(rows.start + 1)
    return scores.masked_fill_(future, float("-inf"))


def plain_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One document: q [L, N, H], k and v [L, K, H] → out [L, N, H], lse [N, L]."""
    dtype = _score_dtype(q)
    q_KGLH, k_K1LH, v_K1LH = (_grouped(x, k.shape[1], dtype) for x in (q, k, v))
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for rows in _blocks(q.shape[0], q.shape[1]):
        scores = _scores(q_KGLH, k_K1LH, rows)
        lse = scores.logsumexp(-1)
        p = (scores - lse[..., None]).exp_()
        outs.append(p @ v_K1LH[:, :, : rows.stop])
        lses.append(lse)
    return _ungrouped(torch.cat(outs, 2), q.dtype), torch.cat(lses, 2).flatten(0, 1)


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    """The gradients of `plain_forward` (FlashAttention, arXiv 2205.14135, appendix B.4)."""
    kv_heads = k.shape[1]
    tensors = (q, k, v, out, dout)
    q_KGLH, k_K1LH, v_K1LH, out_KGLH, dout_KGLH = (
        _grouped(x, kv_heads, _score_dtype(q)) for x in tensors
    )
    lse_KGL1 = lse.unflatten(0, (kv_heads, -1))[..., None]
    delta_KGL1 = (out_KGLH * dout_KGLH).sum(-1, keepdim=True)
    scale = q.shape[-1] ** -0.5
    dq = torch.empty_like(q_KGLH)
    dk = torch.zeros_like(k_K1LH)
    dv = torch.zeros_like(v_K1LH)
    for rows in _blocks(q.shape[0], q.shape[1]):
        keys = slice(0, rows.stop)
        d_rows = dout_KGLH[:, :, rows]
        p = (_scores(q_KGLH, k_K1LH, rows) - lse_KGL1[:, :, rows]).exp_()
        dv[:, :, keys] += (p.transpose(-1, -2) @ d_rows).sum(1, keepdim=True)
        dp = d_rows @ v_K1LH[:, :, keys].transpose(-1, -2)
        ds = (dp - delta_KGL1[:, :, rows]).mul_(p).mul_(scale)
        dq[:, :, rows] = ds @ k_K1LH[:, :, keys]
        dk[:, :, keys] += (ds.transpose(-1, -2) @ q_KGLH[:, :, rows]).sum(1, keepdim=True)
    return _ungrouped(dq, q.dtype), _ungrouped(dk, q.dtype), _ungrouped(dv, q.dtype)
