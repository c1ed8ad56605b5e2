"""One chunk of logits: the product that makes it, its softmax statistics, its gradient. And what the
weight's gradient is scaled by at the end.

Plain torch here, Triton kernels on a GPU.

Shapes: T tokens · D model · C tokens of a chunk · S vocabulary entries of a chunk

All are in the accumulation dtype (float32, or float64 for float64 inputs) and overwrite the chunk.
Statistics of T tokens are the rows of one [4, T] tensor: the largest scaled logit x so far, Σ exp(x
− largest), Σ (x − largest)·exp(x − largest), and the label's x (NaN until met, so that a label
outside the vocabulary can't pass as a number).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fused(x: Tensor) -> bool:
    """Whether the Triton kernels take this chunk."""
    return x.is_cuda and x.dtype == torch.float32


def workspace(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """Room for a chunk, used by every chunk in turn.

    Rows start at multiples of 256 bytes, which the fast matrix products need.
    """
    stride = -(-columns // 64) * 64 if hidden.is_cuda else columns
    return hidden.new_empty((rows, stride), dtype=accumulation_dtype(hidden))


def product(hidden_CD: Tensor, weight_SD: Tensor, buffer: Tensor) -> Tensor:
    """hidden @ weight.T [C, S] in the accumulation dtype, written into `buffer`."""
    out = buffer[: len(hidden_CD), : len(weight_SD)]
    if hidden_CD.dtype == out.dtype:
        return torch.mm(hidden_CD, weight_SD.t(), out=out)
    # The product adds up in fp32 anyway: only the rounding of its result to bf16 is left out
    if hidden_CD.is_cuda:
        return torch.ops.aten.mm.dtype_out(hidden_CD, weight_SD.t(), out.dtype, out=out)
    return torch.mm(hidden_CD.to(out.dtype), weight_SD.t().to(out.dtype), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, with `out` in the accumulation dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.addmm_(a, b.to(out.dtype))


def new_stats(hidden_TD: Tensor) -> Tensor:
    """Statistics [4, T] of no logits."""
    stats = hidden_TD.new_zeros((4, len(hidden_TD)), dtype=accumulation_dtype(hidden_TD))
    stats[0] = torch.finfo(stats.dtype).min / 2  # finite: what is below it is zero, not undefined
    stats[3] = math.nan
    return stats


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap) in their place (Gemma 2, arXiv 2408.00118); as they are with cap 0."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def update(
    stats: Tensor,
    logits_CS: Tensor,
    labels_C: Tensor,
    scale: float,
    entropy: bool,
    cap: float = 0.0,
) -> None:
    """Take a chunk into `stats` [4, C], the third row only with `entropy`.

    `labels_C` count from the chunk's first entry; x = scale · logit, capped before it is scaled.
    """
    if _fused(logits_CS):
        from retool.model.logits_triton import update_rows

        return update_rows(stats, logits_CS, labels_C, scale, entropy, cap)
    largest, total, weighted, picked = stats
    x = capped(logits_CS, cap).mul_(scale)
    above = torch.maximum(largest, x.amax(1))
    p = (x - above[:, None]).exp_()
    # Softmax in one pass: where a chunk has a larger entry, the sums so far are scaled down to it
    decay = (largest - above).exp_()
    sums = p.sum(1)
    here, index = _locate(labels_C, x.shape[1])
    # A label lies in one chunk of the vocabulary: the others leave what was picked
    picked.copy_(torch.where(here, x.gather(1, index)[:, 0], picked))
    if entropy:
        # About `above` instead of `largest`: the total times their distance more, then scaled as it is
        weighted.addcmul_(total, largest - above).mul_(decay).add_(
            p.mul_(x.sub_(above[:, None])).sum(1)
        )
    total.mul_(decay).add_(sums)
    largest.copy_(above)


def finish(stats: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log p(label), log-sum-exp, entropy or None), each [T]."""
    largest, total, weighted, picked = stats
    log_total = total.log()
    lse = largest + log_total
    return picked - lse, lse, log_total - weighted / total if entropy else None


def gradient(
    logits_CS: Tensor,
    labels_C: Tensor,
    scale: float,
    lse_C: Tensor,
    entropy_C: Tensor | None,
    g_logp_C: Tensor,
    g_entropy_C: Tensor | None,
    dtype: torch.dtype,
    cap: float = 0.0,
) -> Tensor:
    """What flows into the unscaled logits [C, S] when `g_logp` and `g_entropy` flow into log
    p(label) and the entropy.

    scale · (g_logp (1[j = label] − p_j) − g_entropy p_j (log p_j + entropy)), in the chunk's
    memory; in `dtype` on a GPU. With a cap, times its slope, 1 − (capped logit / cap)².
    """
    if _fused(logits_CS):
        from retool.model.logits_triton import gradient_rows

        return gradient_rows(
            logits_CS, labels_C, scale, lse_C, entropy_C, g_logp_C, g_entropy_C, dtype, cap
        )
    here, index = _locate(labels_C, logits_CS.shape[1])
    slope = _slope(capped(logits_CS, cap), cap)
    log_p = logits_CS.mul_(scale).sub_(lse_C[:, None])
    if g_entropy_C is None or entropy_C is None:
        out = log_p.exp_().mul_(-g_logp_C[:, None])
    else:
        p = log_p.exp()
        out = (
            log_p.add_(entropy_C[:, None])
            .mul_(-g_entropy_C[:, None])
            .sub_(g_logp_C[:, None])
            .mul_(p)
        )
    out = out.scatter_add_(1, index, (g_logp_C * here)[:, None]).mul_(scale)
    return out if slope is None else out.mul_(slope)


def softmax_gradient(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor,
    logp_C: Tensor,
    dtype: torch.dtype,
    cap: float = 0.0,
) -> Tensor:
    """Fills `logp_C` with log p(label) and returns weights (1[j = label] − p_j), in the chunk's
    memory; in `dtype` on a GPU. With a cap, times its slope.

    These are whole rows of logits. On a GPU, `logp_C` of tokens with weight 0 is left as it was.
    """
    if _fused(logits_CV):
        from retool.model.logits_triton import softmax_gradient_rows

        return softmax_gradient_rows(logits_CV, labels_C, weights_C, logp_C, dtype, cap)
    slope = _slope(capped(logits_CV, cap), cap)
    lse = logits_CV.logsumexp(1)
    logp_C.copy_(logits_CV.gather(1, labels_C[:, None])[:, 0] - lse)
    out = logits_CV.sub_(lse[:, None]).exp_().mul_(-weights_C[:, None])
    out = out.scatter_add_(1, labels_C[:, None], weights_C[:, None])
    return out if slope is None else out.mul_(slope)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a 0-d factor, rounded once to `dtype`, in memory of its own."""
    if _fused(x) and x.is_contiguous():
        from retool.model.logits_triton import scaled_elements

        return scaled_elements(x, factor, dtype)
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _slope(capped_logits: Tensor, cap: float) -> Tensor | None:
    """By how much a capped logit grows with what it was before; None without a cap."""
    return 1 - (capped_logits / cap).square_() if cap else None


def _locate(labels_C: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """(whether the label lies in this chunk [C], an index in range [C, 1])."""
    return (labels_C >= 0) & (labels_C < entries), labels_C.clamp(0, entries - 1)[:, None]
