"""Seeded sampling: one token per row of logits, its log-probability, and that of the distribution
it was drawn from.

The draw is a Gumbel maximum (Gumbel 1954): argmax of x + g over the kept tokens, x = logits /
temperature, has the distribution softmax(x). The noise g is a function of (seed, position in the
sequence, token id) alone. So it doesn't matter which rows are sampled together, in which order, or
how often.

Shapes: R rows · V vocab. 64-bit integers are signed here, and wrap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retool.engine.kernels.draws import FIRST, GOLDEN, SECOND, Draws

MANY_TOKENS = 1024  # among which the last one that a filter keeps nearly always is


def sample(logits_RV: Tensor, draws: Draws, filtered: bool) -> Tensor:
    """Draw a token per row: [3, R] of token id, logp and logp_behaviour, in the dtype of the logits
    (ids are exact below 2^24).

    logits are float32 or float64 and may be overwritten. `filtered`: whether any row has a top-k or
    top-p. Temperature 0 takes the first largest logit; its logp is that of temperature 1, its
    logp_behaviour 0.
    """
    if logits_RV.is_cuda and logits_RV.dtype == torch.float32:
        from retool.engine.kernels.sampling_triton import sample_rows

        return sample_rows(logits_RV, draws, filtered)

    greedy = draws.temperature == 0
    scale = torch.where(greedy, 1.0, 1.0 / draws.temperature)
    x = logits_RV.mul_(scale[:, None])
    noise = gumbel(row_keys(draws), x.shape[1])
    # At temperature 0 without noise: the first of the largest wins
    scores = torch.where(greedy[:, None], x, x + noise)
    kept = x
    if filtered:
        least = cutoff(x, draws.top_k, draws.top_p)
        out = (x < least[:, None]) & ~greedy[:, None]
        scores = scores.masked_fill_(out, float("-inf"))
        kept = x.masked_fill(out, float("-inf"))

    token = scores.argmax(-1)
    chosen = x.gather(1, token[:, None])[:, 0]
    whole = x.logsumexp(-1)
    normal = kept.logsumexp(-1) if filtered else whole
    behaviour = torch.where(greedy, 0.0, chosen - normal)
    return torch.stack([token.to(x.dtype), chosen - whole, behaviour])


def row_keys(draws: Draws) -> Tensor:
    """One key per row from its seed and position, int64 [R]."""
    return mixed(draws.keys + mixed(draws.positions * GOLDEN))


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's output function on int64 of any shape."""
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(keys_R: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [R, V] in float32 from 32 random bits each.

    −log(−log1p(−w)) with w in (0, 1): what wins lies at small w, where float32 resolves it down to
    2^-33, noise up to 22.9.
    """
    counters = torch.arange(1, vocab + 1, device=keys_R.device) * GOLDEN
    bits = (mixed(keys_R[:, None] + counters) >> 32) & 0xFFFFFFFF
    w = (bits.to(torch.float32) + 0.5) * 2.0**-32
    w = w.clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


def cutoff(x_RV: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest x that top-k, then top-p keeps, [R]: tokens with x at least this.

    Ties with the last one kept are kept.

    `top_k` ≤ 0 keeps all. `top_p` keeps the fewest tokens, likeliest first, whose share of what
    `top_k` left is at least top_p.
    """
    vocab = x_RV.shape[1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    # A GPU would have to be waited for: whether these are enough is known on the device alone
    if x_RV.is_cuda or vocab <= MANY_TOKENS:
        return _cutoff_of_sorted(x_RV.sort(-1, descending=True).values, k, top_p)

    # To find the likeliest takes a tenth of the time that sorting all of them takes.
    likeliest = x_RV.topk(MANY_TOKENS).values
    share = _share(likeliest, x_RV)
    top_k_is_there = k <= MANY_TOKENS
    top_p_is_there = (k == vocab) & (share >= top_p)
    # A share of all tokens is a larger one of the likeliest
    most = torch.where(top_k_is_there, top_p, top_p / share)
    least = _cutoff_of_sorted(likeliest, k.clamp(max=MANY_TOKENS), most)
    rest = (~(top_k_is_there | top_p_is_there)).nonzero()[:, 0]
    if len(rest):
        ordered = x_RV[rest].sort(-1, descending=True).values
        least[rest] = _cutoff_of_sorted(ordered, k[rest], top_p[rest])
    return least


def _share(likeliest: Tensor, x_RV: Tensor) -> Tensor:
    """How much of a row's probability its largest x have together: float64 [R]."""
    top = likeliest[:, :1].double()
    part, whole = ((x - top).exp().sum(-1) for x in (likeliest, x_RV))
    return part / whole


def _cutoff_of_sorted(ordered: Tensor, k: Tensor, top_p: Tensor) -> Tensor:
    """`cutoff` of rows in descending order; each k is a number of them."""
    lowest = ordered.gather(1, k[:, None] - 1)
    left = ordered.masked_fill(ordered < lowest, float("-inf"))
    # fp32 sums miss by a token of 150,000
    p = left.softmax(-1, dtype=torch.float64)
    before = p.cumsum(-1) - p
    kept = (before < top_p[:, None].to(p.dtype)).sum(-1, keepdim=True).clamp(min=1)
    least = torch.where(top_p[:, None] < 1, ordered.gather(1, kept - 1), lowest)
    return torch.maximum(lowest, least)[:, 0]
