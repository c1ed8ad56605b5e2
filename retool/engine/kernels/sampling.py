"""Seeded sampling: one token per row of logits, its log-probability, and that of the distribution
it was drawn from.

A row is cut into blocks of `BLOCK` tokens. A block is drawn by its share of the row, then a token by
its share of the block. Each has a uniform number of its own: what it draws is the first place where
the cumulated shares exceed it. Both numbers are functions of (seed, position in the sequence) alone.
So it doesn't matter which rows are sampled together, in which order, or how often.

Devices and dtypes draw alike, but where a number lies within the rounding of a limit between two
blocks: at most twice in a million draws from 150,000 tokens. Limits between tokens are in float64.

Shapes: R rows · V vocab · B blocks · W tokens of a block. 64-bit integers are signed here, and wrap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retool.engine.kernels.draws import BLOCK, FIRST, GOLDEN, SECOND, Draws

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

    greedy_R = draws.temperature == 0
    scale_R = torch.where(greedy_R, 1.0, 1.0 / draws.temperature)
    x_RV = logits_RV.mul_(scale_R[:, None])
    greedy = greedy_R[:, None]
    least = None
    if filtered:
        least = cutoff(x_RV, draws.top_k, draws.top_p)[:, None]
        least = least.masked_fill(greedy, float("-inf"))

    # At temperature 0 only the largest count, and of these the first is taken
    for_block, for_token = uniforms(draws).masked_fill_(greedy, 0.0)
    largest_RB, whole_RB, kept_RB = masses(x_RV, least)
    top = largest_RB.amax(-1, keepdim=True)
    share_RB = (largest_RB - top).double().exp()
    block = picked(torch.where(greedy, largest_RB == top, share_RB * kept_RB), for_block)

    token_RW, x_RW = tokens_of(x_RV, block)
    limit = largest_RB.gather(1, block)
    weights_RW = (x_RW - limit).double().exp()
    if least is not None:
        weights_RW.masked_fill_(x_RW < least, 0.0)
    place = picked(torch.where(greedy, x_RW == limit, weights_RW), for_token)

    above = x_RW.gather(1, place) - top
    logp, behaviour = (
        above - (share_RB * part_RB).sum(-1, keepdim=True).log() for part_RB in (whole_RB, kept_RB)
    )
    behaviour.masked_fill_(greedy, 0.0)
    return torch.stack([token_RW.gather(1, place), logp, behaviour])[..., 0].to(x_RV.dtype)


def masses(x_RV: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block [R, B]: its largest x, and the sums of exp(x − largest) over all its tokens and
    over those of at least `least` [R, 1].
    """
    whole_blocks = x_RV.shape[1] // BLOCK * BLOCK
    blocks = x_RV[:, :whole_blocks].unflatten(1, (-1, BLOCK))
    rest = x_RV[:, None, whole_blocks:]
    found = [_masses(x_RBW, least) for x_RBW in (blocks, rest) if x_RBW.numel()]
    largest_RB, whole_RB, kept_RB = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return largest_RB, whole_RB, kept_RB


def _masses(x_RBW: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    # A block may be minus infinity throughout: no difference of infinities
    largest_RB = x_RBW.amax(-1).clamp_(min=torch.finfo(x_RBW.dtype).min)
    weights_RBW = (x_RBW - largest_RB[..., None]).exp_()
    whole_RB = weights_RBW.sum(-1)
    if least is None:
        return largest_RB, whole_RB, whole_RB
    weights_RBW.masked_fill_(x_RBW < least[..., None], 0.0)
    return largest_RB, whole_RB, weights_RBW.sum(-1)


def tokens_of(x_RV: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of each row's `block` [R, 1] and their x, minus infinity beyond the vocabulary's end:
    [R, W].
    """
    last = x_RV.shape[1] - 1
    token_RW = block * BLOCK + torch.arange(min(BLOCK, last + 1), device=x_RV.device)
    inside_RW = token_RW.clamp(max=last)
    x_RW = x_RV.gather(1, inside_RW)
    return inside_RW, x_RW.masked_fill_(token_RW > last, float("-inf"))


def picked(weights: Tensor, uniform: Tensor) -> Tensor:
    """Per row the first place where the cumulated weights exceed `uniform` of their sum, [R, 1].

    This place has a weight. With a number below 1 there is one, unless a weight is NaN.
    """
    cumulated = weights.cumsum(-1)
    target = uniform * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=weights.shape[1] - 1)


def uniforms(draws: Draws) -> Tensor:
    """Two numbers a row, for the block and for the token: float64 [2, R, 1] in (0, 1).

    They are places 2 × position and the next of the seed's SplitMix64, of 52 random bits each.
    """
    level = torch.arange(2, device=draws.keys.device)[:, None]
    counters = draws.keys + (draws.positions * 2 + level) * GOLDEN
    bits = _shifted(mixed(counters), 12)
    # Half a step away from 0 and from 1, and exact
    return (bits[..., None].double() + 0.5) * 2.0**-52


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's output function on int64 of any shape."""
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


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
