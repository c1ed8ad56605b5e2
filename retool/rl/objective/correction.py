"""The sampler's distribution against the trainer's: measured each step, and corrected where asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Tokens = Sequence[np.ndarray]
BOUND = 20.0


def correction_weights(
    old: Tokens, behaviour: Tokens, masks: Tokens, level: str | None, threshold: float
) -> list[np.ndarray]:
    """Truncated importance weights min(exp(old - behaviour), threshold) per sampled token; with
    `level` sequence the product over the sequence on each of its tokens (truncated importance
    sampling, arXiv 0711.2243; 1 everywhere for level None).
    """
    weights = []
    for o, b, mask in zip(old, behaviour, masks, strict=True):
        difference = np.where(mask, o.astype(np.float64) - b, 0.0)
        if level == "sequence":
            difference = np.full(len(mask), difference.sum())
        weight = (
            np.minimum(np.exp(np.clip(difference, -BOUND, BOUND)), threshold)
            if level
            else np.ones(len(mask))
        )
        weights.append(np.where(mask, weight, 0.0))
    return weights


def gap_metrics(sampler: Tokens, trainer: Tokens, masks: Tokens) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's over sampled tokens: mean, max
    and std of |Δ log p| and |Δ p|, and the k3 estimate of KL(sampler ‖ trainer) on the sampler's
    own tokens.
    """
    s, t = (
        np.concatenate([v[m] for v, m in zip(values, masks, strict=True)]).astype(np.float64)
        for values in (sampler, trainer)
    )
    if not len(s):
        return {}
    logs = np.abs(s - t)
    probs = np.abs(np.exp(s) - np.exp(t))
    d = np.clip(t - s, -BOUND, BOUND)
    out = {}
    for name, values in (("logp", logs), ("probs", probs)):
        out |= {
            f"training/rollout_{name}_diff_{kind}": float(getattr(values, kind)())
            for kind in ("mean", "max", "std")
        }
    return {**out, "training/rollout_actor_kl_k3": float((np.expm1(d) - d).mean())}


def weight_metrics(weights: Tokens, masks: Tokens, threshold: float) -> dict[str, float]:
    """Mean and extremes of the correction, and the share of tokens at the threshold."""
    chosen = np.concatenate([w[m] for w, m in zip(weights, masks, strict=True)])
    if not len(chosen):
        return {}
    return {
        "rollout_correction/mean": float(chosen.mean()),
        "rollout_correction/max": float(chosen.max()),
        "rollout_correction/min": float(chosen.min()),
        "rollout_correction/cut": float((chosen >= threshold).mean()),
    }
