"""Causal attention document by document, in float32, float64 or bfloat16, on any device.

Shapes: T tokens · N query heads · K key/value heads · G query heads per key/value head
· L tokens of a document · H head dim · B documents

On the CPU it runs torch's blocked kernel (memory linear in L, exact in float64, about six times as
fast as writing the formula down). Elsewhere, in layers with a window and where scores are capped, it is
the formula, over blocks of queries so that no more than `SCORE_BUDGET` scores exist at a time. Keys that no query of a
block sees aren't computed.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from retool.model.attention.pack import Attended, Gradients, Pack

SCORE_BUDGET = 1 << 26  # elements of a block of scores
MIN_WINDOW_ROWS = 64  # of queries at a time, however small the window


def reference_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Attended:
    """q [T, N, H], k and v [T, K, H] → out [T, N, H] in q's dtype, and its log-sum-exp [N, T].

    The log-sum-exp is float64 for float64 inputs, else float32.
    """
    document = partial(plain_forward, window=pack.window, cap=pack.cap)
    if _blocked(q, pack):
        document = _cpu_forward
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=_score_dtype(q))
    for tokens in _documents(pack.seqlens):
        out[tokens], lse[:, tokens] = document(q[tokens], k[tokens], v[tokens])
    return out, lse


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack
) -> Gradients:
    """(dq, dk, dv) in the dtypes of q, k, v."""
    document = partial(plain_backward, window=pack.window, cap=pack.cap)
    if _blocked(q, pack):
        document = _cpu_backward
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    for tokens in _documents(pack.seqlens):
        dq[tokens], dk[tokens], dv[tokens] = document(
            dout[tokens], q[tokens], k[tokens], v[tokens], out[tokens], lse[:, tokens]
        )
    return dq, dk, dv


def _blocked(q: Tensor, pack: Pack) -> bool:
    """Whether torch's blocked kernel takes this: it has no windows and no caps."""
    return q.device.type == "cpu" and not pack.window and not pack.cap


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


def _blocks(length: int, heads: int, window: int = 0) -> list[slice]:
    """Rows of queries whose scores against all keys are within the budget.

    In a window's layer no more rows than it has keys: most that they meet they see.
    """
    rows = max(1, SCORE_BUDGET // (heads * length))
    if window:
        rows = min(rows, max(window, MIN_WINDOW_ROWS))
    return [slice(i, min(i + rows, length)) for i in range(0, length, rows)]


def _grouped(x_LNH: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[L, N, H] → [K, G, L, H]"""
    return x_LNH.to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_KGLH: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, G, L, H] → [L, N, H]"""
    return x_KGLH.permute(2, 0, 1, 3).flatten(1, 2).to(dtype)


def _keys(rows: slice, window: int) -> slice:
    """The keys that some of these queries see."""
    return slice(max(0, rows.start - window + 1) if window else 0, rows.stop)


def _scores(q_KGLH: Tensor, k_K1LH: Tensor, rows: slice, window: int, cap: float) -> Tensor:
    """Scaled scores [K, G, rows, `_keys`], with -inf where a query doesn't see a key."""
    keys = _keys(rows, window)
    scale = q_KGLH.shape[-1] ** -0.5
    scores = q_KGLH[:, :, rows] @ k_K1LH[:, :, keys].transpose(-1, -2) * scale
    if cap:
        scores.div_(cap).tanh_().mul_(cap)
    # Column and row of a token differ: keys count from `keys.start`, queries from `rows.start`
    diagonal = rows.start - keys.start
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    hidden = hidden.triu(diagonal + 1)
    if window:
        hidden |= torch.ones_like(hidden).tril_(diagonal - window)
    return scores.masked_fill_(hidden, float("-inf"))


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int = 0, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One document: q [L, N, H], k and v [L, K, H] → out [L, N, H], lse [N, L]."""
    dtype = _score_dtype(q)
    q_KGLH, k_K1LH, v_K1LH = (_grouped(x, k.shape[1], dtype) for x in (q, k, v))
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for rows in _blocks(q.shape[0], q.shape[1], window):
        scores = _scores(q_KGLH, k_K1LH, rows, window, cap)
        lse = scores.logsumexp(-1)
        p = (scores - lse[..., None]).exp_()
        outs.append(p @ v_K1LH[:, :, _keys(rows, window)])
        lses.append(lse)
    return _ungrouped(torch.cat(outs, 2), q.dtype), torch.cat(lses, 2).flatten(0, 1)


def plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int = 0,
    cap: float = 0.0,
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
    for rows in _blocks(q.shape[0], q.shape[1], window):
        keys = _keys(rows, window)
        d_rows = dout_KGLH[:, :, rows]
        scores = _scores(q_KGLH, k_K1LH, rows, window, cap)
        p = (scores - lse_KGL1[:, :, rows]).exp_()
        dv[:, :, keys] += (p.transpose(-1, -2) @ d_rows).sum(1, keepdim=True)
        dp = d_rows @ v_K1LH[:, :, keys].transpose(-1, -2)
        ds = (dp - delta_KGL1[:, :, rows]).mul_(p).mul_(scale)
        if cap:
            # The slope of cap · tanh. What a query doesn't see has no share, and must stay a number
            ds.mul_(1 - scores.clamp_(min=-cap).div_(cap).square_())
        dq[:, :, rows] = ds @ k_K1LH[:, :, keys]
        dk[:, :, keys] += (ds.transpose(-1, -2) @ q_KGLH[:, :, rows]).sum(1, keepdim=True)
    return _ungrouped(dq, q.dtype), _ungrouped(dk, q.dtype), _ungrouped(dv, q.dtype)
