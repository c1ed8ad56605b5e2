"""Policy losses, KL estimators, and how token losses become one number.

Pure: tensors in, (loss_sum, metrics) out.

Every function takes a slice of the global mini-batch, in any order and of any size: `weights_T`
already holds each token's share of the mean (see `token_weights`), so the sum over all slices of
all ranks is the loss, whatever the layout.

T tokens of the slice. `logp_T` (differentiable), `old_T`, `advantages_T`, `weights_T`: float [T]. A
weight of 0 is a token that wasn't sampled. Metrics are sums over the slice with the same weights,
so they add up to means in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BOUND = 20.0  # exp(20) is finite in every dtype, and far beyond every clip
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Clip:
    """PPO's bounds: the ratio within [1 - low, 1 + high]; the loss of a negative advantage at most
    c times it.
    """

    low: float = 0.2
    high: float = 0.2
    c: float = 3.0


def log_ratio(logp_T: Tensor, old_T: Tensor) -> Tensor:
    """log(new/old), clamped to ±20."""
    return torch.clamp(logp_T - old_T, -BOUND, BOUND)


def vanilla(
    logp_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    clip: Clip,
    sequence_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate with dual clip (arXiv 1707.06347, 1912.09729): max(-A·r, -A·clip(r)),
    and for A < 0 at most -A·c.
    """
    del sequence_T
    return _clipped(log_ratio(logp_T, old_T).exp(), logp_T, old_T, advantages_T, weights_T, clip)


def gspo(
    logp_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    clip: Clip,
    sequence_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO-token (arXiv 2507.18071, eq.

    13-14): the ratio of a sequence, its length's root, on each of its tokens.

    `sequence_T` is each token's sequence mean of log(new/old) over sampled tokens, without gradient
    (see `sequence_means`); the gradient is each token's own. As published there is no dual clip.
    """
    assert sequence_T is not None, "gspo needs the sequence means"
    log_s = torch.clamp(sequence_T.detach() + logp_T - logp_T.detach(), max=10.0)
    return _clipped(
        log_s.exp(), logp_T, old_T, advantages_T, weights_T, Clip(clip.low, clip.high, float("inf"))
    )


def cispo(
    logp_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    clip: Clip,
    sequence_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (arXiv 2506.13585, eq. 4-5): REINFORCE weighted by the clipped ratio, through which no
    gradient flows; no token is dropped from the gradient.
    """
    del sequence_T
    ratio = log_ratio(logp_T, old_T).exp().detach()
    clipped = torch.clamp(ratio, 1 - clip.low, 1 + clip.high)
    losses = -clipped * advantages_T * logp_T
    return _sum(losses, weights_T), _metrics(
        losses, ratio != clipped, torch.zeros_like(ratio), logp_T, old_T, weights_T
    )


def _clipped(
    ratio: Tensor, logp: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, clip: Clip
) -> tuple[Tensor, Metrics]:
    plain = -advantages * ratio
    bounded = -advantages * torch.clamp(ratio, 1 - clip.low, 1 + clip.high)
    upper = torch.maximum(plain, bounded)
    lost = bounded > plain
    negative = advantages < 0
    ceiling = -advantages * clip.c if np.isfinite(clip.c) else torch.full_like(upper, torch.inf)
    losses = torch.where(negative, torch.minimum(upper, ceiling), upper)
    return _sum(losses, weights), _metrics(
        losses, lost, negative & (ceiling < upper), logp, old, weights
    )


def _sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · value; where the weight is 0 the value has no say, not even an infinite one."""
    return (torch.where(weights != 0, values, 0) * weights).sum()


def _metrics(
    losses: Tensor, clipped: Tensor, lower: Tensor, logp: Tensor, old: Tensor, weights: Tensor
) -> Metrics:
    with torch.no_grad():
        return {
            "actor/pg_loss": _sum(losses, weights),
            "actor/pg_clipfrac": _sum(clipped.to(losses.dtype), weights),
            "actor/pg_clipfrac_lower": _sum(lower.to(losses.dtype), weights),
            "actor/ppo_kl": _sum(-log_ratio(logp, old), weights),
        }


def sequence_sums(
    logp_T: Tensor, old_T: Tensor, sampled_T: Tensor, sequences_T: Tensor, count: int
) -> Tensor:
    """[2, count]: Σ log(new/old) and the number of sampled tokens of each sequence, of this slice.
    Add the slices of a sequence-parallel group before `sequence_means`.
    """
    difference = torch.where(sampled_T, logp_T.detach() - old_T, 0)
    sums = torch.zeros(2, count, dtype=logp_T.dtype, device=logp_T.device)
    return sums.index_add_(1, sequences_T, torch.stack([difference, sampled_T.to(logp_T.dtype)]))


def sequence_means(sums: Tensor, sequences_T: Tensor) -> Tensor:
    """Each token's sequence mean, from `sequence_sums`; 0 for a sequence without a sampled token."""
    return (sums[0] / sums[1].clamp(min=1))[sequences_T]


def kl(logp_T: Tensor, ref_T: Tensor, kind: str) -> Tensor:
    """Estimators of KL(policy ‖ reference) per token (Schulman 2020,
    http://joschu.net/blog/kl-approx.html), with d = ref - logp:

    k1 = -d · abs = |d| · k2 = d²/2 · k3 = e^d - 1 - d. With `+` the value is that kind's and the
    gradient k2's, whose expectation is the gradient of the KL. Only k3 has bounds, because e^d
    overflows: d at ±20, its value at 10, as in verl; one token that the policy all but lost would
    outweigh the rest.
    """
    d = ref_T - logp_T
    value = KL_KINDS[kind.removesuffix("+")](d)
    if kind.endswith("+"):
        slope = 0.5 * d.square()
        value = slope - slope.detach() + value.detach()
    return value


def _k3(d: Tensor) -> Tensor:
    bounded = torch.clamp(d, -BOUND, BOUND)
    return torch.clamp(torch.expm1(bounded) - bounded, max=10)


def kl_sum(logp_T: Tensor, ref_T: Tensor, weights_T: Tensor, kind: str) -> Tensor:
    """The slice's part of the mean KL."""
    return _sum(kl(logp_T, ref_T, kind), weights_T)


def entropy_sum(entropy_T: Tensor, weights_T: Tensor) -> Tensor:
    """The slice's part of the mean entropy."""
    return _sum(entropy_T, weights_T)


def token_weights(
    masks: Sequence[np.ndarray], mode: str, max_response_length: int
) -> list[np.ndarray]:
    """Each token's share of the loss of the *global* mini-batch whose sampled tokens `masks` are;
    float64, 0 where not sampled.

    token-mean: 1/all sampled tokens · seq-mean-token-sum: 1/sequences · seq-mean-token-mean:
    1/(sequences · its tokens) · seq-mean-token-sum-norm: 1/(sequences · max_response_length), Dr.
    GRPO's. A sequence without a sampled token counts in none.
    """
    counts = [int(mask.sum()) for mask in masks]
    tokens = max(sum(counts), 1)
    sequences = max(sum(n > 0 for n in counts), 1)
    share = {
        "token-mean": lambda n: 1 / tokens,
        "seq-mean-token-sum": lambda n: 1 / sequences,
        "seq-mean-token-mean": lambda n: 1 / (sequences * n),
        "seq-mean-token-sum-norm": lambda n: 1 / (sequences * max_response_length),
    }[mode]
    return [
        np.where(mask, share(n) if n else 0.0, 0.0) for mask, n in zip(masks, counts, strict=True)
    ]


PolicyLoss = Callable[
    [Tensor, Tensor, Tensor, Tensor, Clip, "Tensor | None"], tuple[Tensor, Metrics]
]
LOSSES: dict[str, PolicyLoss] = {"vanilla": vanilla, "gspo": gspo, "cispo": cispo}
KL_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.neg,
    "abs": torch.abs,
    "k2": lambda d: 0.5 * d.square(),
    "k3": _k3,
}
