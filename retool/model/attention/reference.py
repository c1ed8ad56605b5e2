"""Causal attention document by document, in float32, float64 or bfloat16, on any device.

Shapes: T tokens · N query heads · K key/value heads · G query heads per key/value head · L tokens
of a document · H head dim · B documents

On the CPU it runs torch's blocked kernel (memory linear in L, exact in float64, about six times as
fast as writing the formula down). Elsewhere it is the formula, over blocks of queries so that no
more than `SCORE_BUDGET` scores exist at a time.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

SCORE_BUDGET = 1 << 26  # elements

Gradients = tuple[Tensor, Tensor, Tensor]


class Pack(NamedTuple):
    """Where the documents lie: `cu_seqlens` int32 [B+1] on the device, the rest on the host."""

    cu_seqlens: Tensor
    max_seqlen: int
    seqlens: tuple[int, ...]


def reference_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """out [T, N, H] in q's dtype and lse [N, T] (float64 for float64 inputs, else float32) of q [T,
    N, H], k and v [T, K, H].
    """
    document = _cpu_forward if q.device.type == "cpu" else plain_forward
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=_score_dtype(q))
    for tokens in _slices(pack.seqlens):
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
    for tokens in _slices(pack.seqlens):
        dq[tokens], dk[tokens], dv[tokens] = document(
            dout[tokens], q[tokens], k[tokens], v[tokens], out[tokens], lse[:, tokens]
        )
    return dq, dk, dv


def _slices(seqlens: tuple[int, ...]) -> list[slice]:
    return [slice(end - n, end) for end, n in zip(accumulate(seqlens), seqlens, strict=True)]


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# ── torch's blocked CPU kernel: [1, N, L, H], as many key/value heads as query heads
# ─────────────────────────────


def _expanded(x_LKH: Tensor, heads: int) -> Tensor:
    return x_LKH.repeat_interleave(heads // x_LKH.shape[1], 1).transpose(0, 1)[None]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None], _expanded(k, heads), _expanded(v, heads), 0.0, True
    )
    return out[0].transpose(0, 1), lse[0]


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    heads = q.shape[1]
    groups = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout.transpose(0, 1)[None],
        q.transpose(0, 1)[None],
        _expanded(k, heads),
        _expanded(v, heads),
        out.transpose(0, 1)[None],
        lse[None].contiguous(),
        0.0,
        True,
    )
    dk, dv = (
        x[0].unflatten(0, (-1, groups)).sum(1, dtype=lse.dtype).transpose(0, 1) for x in (dk, dv)
    )
    return dq[0].transpose(0, 1), dk, dv


# ── the formula
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def _blocks(length: int, heads: int) -> list[slice]:
    rows = max(1, SCORE_BUDGET // (heads * length))
    return [slice(i, min(i + rows, length)) for i in range(0, length, rows)]


def _grouped(x_LNH: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[L, N, H] → [K, G, L, H]"""
    return x_LNH.to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _scores(q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """Scaled scores [K, G, rows, keys up to the last row] with -inf above the diagonal, of q [K, G,
    L, H] and k [K, 1, L, H].
    """
    scores = q[:, :, rows] @ k[:, :, : rows.stop].transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(rows.start + 1)
    return scores.masked_fill_(future, float("-inf"))


def plain_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One document: q [L, N, H], k and v [L, K, H] → out [L, N, H], lse [N, L]."""
    dtype = _score_dtype(q)
    kv_heads = k.shape[1]
    q_KGLH, k_K1LH, v_K1LH = (_grouped(x, kv_heads, dtype) for x in (q, k, v))
    outs = []
    lses = []
    for rows in _blocks(q.shape[0], q.shape[1]):
        scores = _scores(q_KGLH, k_K1LH, rows)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp_() @ v_K1LH[:, :, : rows.stop])
    return torch.cat(outs, 2).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), torch.cat(
        lses, 2
    ).flatten(0, 1)


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    """One document; the gradients of `plain_forward` (FlashAttention, arXiv 2205.14135, appendix
    B.4).
    """
    dtype = _score_dtype(q)
    kv_heads = k.shape[1]
    q_KGLH, k_K1LH, v_K1LH, o, do = (_grouped(x, kv_heads, dtype) for x in (q, k, v, out, dout))
    lse_KGL1 = lse.unflatten(0, (kv_heads, -1))[..., None]
    delta_KGL1 = (o * do).sum(-1, keepdim=True)
    dq = torch.empty_like(q_KGLH)
    dk = torch.zeros_like(k_K1LH)
    dv = torch.zeros_like(v_K1LH)
    for rows in _blocks(q.shape[0], q.shape[1]):
        keys = slice(0, rows.stop)
        p = (_scores(q_KGLH, k_K1LH, rows) - lse_KGL1[:, :, rows]).exp_()
        dv[:, :, keys] += (p.transpose(-1, -2) @ do[:, :, rows]).sum(1, keepdim=True)
        ds = (
            (do[:, :, rows] @ v_K1LH[:, :, keys].transpose(-1, -2) - delta_KGL1[:, :, rows])
            .mul_(p)
            .mul_(q.shape[-1] ** -0.5)
        )
        dq[:, :, rows] = ds @ k_K1LH[:, :, keys]
        dk[:, :, keys] += (ds.transpose(-1, -2) @ q_KGLH[:, :, rows]).sum(1, keepdim=True)
    dq, dk, dv = (x.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv
