"""Policy losses and KL estimators, and how token losses become one number.

Pure: tensors and numbers in, (loss_sum, metrics) out.

A loss sees a slice of the global mini-batch, in any order and of any size. `weights_T` already holds
each token's share of the mean (see `token_weights`). So the sum over all slices of all ranks is the
loss, whatever the layout. Metrics add up likewise: a loss by the same weights, a share of tokens by
`token_share`.

`LOSSES` at the end is the only list of losses; a user's own is a function (`user_functions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is finite in every dtype, and far beyond every clip
MAX_LOG_SEQUENCE_RATIO = 10.0
MAX_K3 = 10.0
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Clip:
    """PPO's bounds: the ratio within [1 - low, 1 + high]; the loss of a negative advantage at most
    c times it.
    """

    low: float = 0.2
    high: float = 0.2
    c: float = 3.0


@dataclass(frozen=True)
class LossInputs:
    """The tokens of one slice of a global mini-batch, as a policy loss sees them.

    T tokens; every tensor is float [T] unless said otherwise. Log-probabilities are of the token
    that was sampled, in nats, under softmax(logits / temperature) over the whole vocabulary.

    logp_T        under the present weights: the only tensor with a gradient
    old_T         under the weights before the step's first update
    sampler_T     as the engine said when it sampled: the same policy, by other kernels
    ref_T         under the reference policy; None where the loss has no KL to one
    advantages_T  times the correction of the sampler, where one is asked for
    weights_T     the token's share of the mini-batch's mean
    token_share   1 / sampled tokens of the mini-batch: a token's share of a mean over tokens
    sampled_T     bool: whether the model sampled the token; where not, its weight is 0 and it must
                  have no say
    sequence_log_ratio_T
                  mean of log(new/old) over all sampled tokens of the token's sequence, on whatever
                  rank they are, without gradient; None unless `PolicyLoss.sequence_level`
    """

    logp_T: Tensor
    old_T: Tensor
    sampler_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor
    sampled_T: Tensor
    token_share: float
    clip: Clip
    ref_T: Tensor | None = None
    sequence_log_ratio_T: Tensor | None = None

    @property
    def log_ratio_T(self) -> Tensor:
        """log(new/old), clamped to ±20."""
        return log_ratio(self.logp_T, self.old_T)

    def sum(self, values_T: Tensor) -> Tensor:
        """This slice's part of the mean of `values_T` over the mini-batch, as `weights_T` say.

        Where the weight is 0 the value has no say, not even an infinite one.
        """
        return weighted_sum(values_T, self.weights_T)

    def token_mean(self, values_T: Tensor) -> Tensor:
        """This slice's part of the mean of `values_T` over the mini-batch's sampled tokens, whatever
        mean the loss has: for what is told per token.
        """
        return (torch.where(self.sampled_T, values_T, 0) * self.token_share).sum()


@dataclass(frozen=True)
class PolicyLoss:
    """A loss and what it needs besides its tokens.

    `aggregation`: the mean it was published with, if it isn't the same loss with any other.
    `sequence_level`: it needs `LossInputs.sequence_log_ratio_T`, which costs a collective.
    `published_clip`: its paper's, where it is far from PPO's.
    """

    function: Callable[[LossInputs], tuple[Tensor, Metrics]]
    aggregation: str | None = None
    sequence_level: bool = False
    published_clip: Clip | None = None

    def aggregated_by(self, asked: str | None) -> str:
        """How the losses of tokens become one number: as `asked`, else as published."""
        return asked or self.aggregation or "token-mean"


# --- losses ---


def vanilla(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate with dual clip.

    max(-A·r, -A·clip(r, 1 - low, 1 + high)), arXiv 1707.06347 eq. 7; for A < 0 at most -A·c,
    arXiv 1912.09729.
    """
    return _clipped(inputs, inputs.log_ratio_T.exp(), inputs.clip.c)


def gspo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """GSPO-token, arXiv 2507.18071 eq. 13-14: each token has the ratio of its sequence.

    That is the geometric mean of its tokens' ratios. Its gradient is the token's own. As published
    there is no dual clip.
    """
    mean_T = inputs.sequence_log_ratio_T
    assert mean_T is not None, "gspo needs the sequences' ratios"
    # The sequence's value, with the gradient of the token
    log_s = mean_T.detach() + inputs.logp_T - inputs.logp_T.detach()
    log_s = torch.clamp(log_s, max=MAX_LOG_SEQUENCE_RATIO)
    return _clipped(inputs, log_s.exp(), ceiling=float("inf"))


def cispo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """CISPO, arXiv 2506.13585 eq. 4-5: REINFORCE weighted by the clipped ratio.

    No gradient flows through the ratio, and no token is dropped from the gradient.
    """
    ratio = inputs.log_ratio_T.exp().detach()
    clipped = torch.clamp(ratio, 1 - inputs.clip.low, 1 + inputs.clip.high)
    losses = -clipped * inputs.advantages_T * inputs.logp_T
    never = torch.zeros_like(clipped, dtype=torch.bool)
    return inputs.sum(losses), _metrics(inputs, losses, clipped != ratio, never)


def _clipped(inputs: LossInputs, ratio: Tensor, ceiling: float) -> tuple[Tensor, Metrics]:
    """PPO's surrogate for any ratio; for A < 0 it is at most -A·`ceiling`."""
    advantages = inputs.advantages_T
    plain = -advantages * ratio
    bounded = -advantages * torch.clamp(ratio, 1 - inputs.clip.low, 1 + inputs.clip.high)
    upper = torch.maximum(plain, bounded)
    # Not the product where there is no ceiling: 0 · ∞ isn't a number
    most = torch.full_like(upper, torch.inf)
    if np.isfinite(ceiling):
        most = -advantages * ceiling
    negative = advantages < 0
    losses = torch.where(negative, torch.minimum(upper, most), upper)
    metrics = _metrics(inputs, losses, bounded > plain, negative & (most < upper))
    return inputs.sum(losses), metrics


def _metrics(inputs: LossInputs, losses: Tensor, clipped: Tensor, at_ceiling: Tensor) -> Metrics:
    with torch.no_grad():
        return {
            "actor/pg_loss": inputs.sum(losses),
            "actor/pg_clipfrac": inputs.token_mean(clipped.to(losses.dtype)),
            "actor/pg_clipfrac_lower": inputs.token_mean(at_ceiling.to(losses.dtype)),
            "actor/ppo_kl": inputs.token_mean(-inputs.log_ratio_T),
        }


# --- what they are made of ---


def log_ratio(logp_T: Tensor, old_T: Tensor) -> Tensor:
    """log(new/old), clamped to ±20."""
    return torch.clamp(logp_T - old_T, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def weighted_sum(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """Σ weight · value. A value whose weight is 0 has no influence, not even an infinite one."""
    return (torch.where(weights_T != 0, values_T, 0) * weights_T).sum()


def sequence_sums(
    logp_T: Tensor, old_T: Tensor, sampled_T: Tensor, sequences_T: Tensor, count: int
) -> Tensor:
    """[2, count]: Σ log(new/old) and the number of sampled tokens of each sequence, of this slice.

    `sequences_T` int64 numbers each token's sequence, of `count`. Add the slices of a
    sequence-parallel group before `sequence_means`.
    """
    difference = torch.where(sampled_T, logp_T.detach() - old_T, 0)
    sums = torch.zeros(2, count, dtype=logp_T.dtype, device=logp_T.device)
    return sums.index_add_(1, sequences_T, torch.stack([difference, sampled_T.to(logp_T.dtype)]))


def sequence_means(sums: Tensor, sequences_T: Tensor) -> Tensor:
    """Each token's sequence mean, from `sequence_sums`; 0 for a sequence without a sampled token."""
    return (sums[0] / sums[1].clamp(min=1))[sequences_T]


# --- KL ---


def kl(logp_T: Tensor, ref_T: Tensor, kind: str) -> Tensor:
    """Estimators of KL(policy ‖ reference) per token: http://joschu.net/blog/kl-approx.html.

    With d = ref - logp: k1 = -d · abs = |d| · k2 = d²/2 · k3 = e^d - 1 - d. With `+` the value is
    that kind's and the gradient k2's, whose expectation is the gradient of the KL.

    Only k3 has bounds, because e^d overflows: d at ±20, its value at 10, as in verl. One token that
    the policy all but lost would outweigh the rest.
    """
    d = ref_T - logp_T
    value = KL_KINDS[kind.removesuffix("+")](d)
    if kind.endswith("+"):
        slope = 0.5 * d.square()
        # Adds nothing to the value, and everything to the gradient
        value = slope - slope.detach() + value.detach()
    return value


def _k3(d: Tensor) -> Tensor:
    bounded = torch.clamp(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.clamp(torch.expm1(bounded) - bounded, max=MAX_K3)


# --- the mean ---


def token_weights(
    masks: Sequence[np.ndarray], mode: str, max_response_length: int
) -> list[np.ndarray]:
    """Each token's share of the loss of the *global* mini-batch whose sampled tokens `masks` are.

    float64, 0 where not sampled. A sequence without a sampled token counts in no mean.

    token-mean               1 / all sampled tokens
    seq-mean-token-sum       1 / sequences
    seq-mean-token-mean      1 / (sequences · the sequence's sampled tokens)
    seq-mean-token-sum-norm  1 / (sequences · max_response_length): Dr. GRPO, arXiv 2503.20783
    """
    counts = [int(mask.sum()) for mask in masks]
    tokens = max(sum(counts), 1)
    sequences = max(sum(n > 0 for n in counts), 1)
    # Functions of a sequence's own count; the totals above are of the whole mini-batch, on all
    # ranks.
    share_of_token = {
        "token-mean": lambda n: 1 / tokens,
        "seq-mean-token-sum": lambda n: 1 / sequences,
        "seq-mean-token-mean": lambda n: 1 / (sequences * n),
        "seq-mean-token-sum-norm": lambda n: 1 / (sequences * max_response_length),
    }[mode]
    weights = []
    for mask, count in zip(masks, counts, strict=True):
        share = share_of_token(count) if count else 0.0
        weights.append(np.where(mask, share, 0.0))
    return weights


KL_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.neg,
    "abs": torch.abs,
    "k2": lambda d: 0.5 * d.square(),
    "k3": _k3,
}
# GSPO's eq. 5 averages over sequences, CISPO's eq. 4 over tokens: with another mean they are other
# objectives. GSPO's clips are of section 5.1.
LOSSES: dict[str, PolicyLoss] = {
    "vanilla": PolicyLoss(vanilla),
    "gspo": PolicyLoss(
        gspo,
        aggregation="seq-mean-token-mean",
        sequence_level=True,
        published_clip=Clip(low=3e-4, high=4e-4),
    ),
    "cispo": PolicyLoss(cispo, aggregation="token-mean"),
}
