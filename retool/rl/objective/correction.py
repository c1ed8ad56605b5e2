"""The sampler's distribution against the trainer's: measured each step, and corrected where asked
for.

Per-token values are one array per trajectory, over all of its tokens; `masks` say which the model
sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PerToken = Sequence[np.ndarray]
MAX_LOG_RATIO = 20.0  # exp(20) is finite, and far beyond every threshold


def correction_weights(
    old: PerToken, behaviour: PerToken, masks: PerToken, level: str | None, threshold: float
) -> list[np.ndarray]:
    """Truncated importance weights min(exp(old - behaviour), threshold) per sampled token.

    Truncated importance sampling, Ionides 2008. With `level` "sequence" each token gets the product
    over its sequence; with None the weights are 1. They are 0 where not sampled.
    """
    weights = []
    for old_logp, drawn_logp, mask in zip(old, behaviour, masks, strict=True):
        if level is None:
            weights.append(np.where(mask, 1.0, 0.0))
            continue
        # In float64: a sequence's product is a sum of thousands of such differences
        log_ratio = np.where(mask, old_logp.astype(np.float64) - drawn_logp, 0.0)
        if level == "sequence":
            log_ratio = np.full(len(mask), log_ratio.sum())
        # `behaviour` is what was drawn from, after top-p and top-k: the weights account for these
        # cuts, too.
        weight = np.exp(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        weights.append(np.where(mask, np.minimum(weight, threshold), 0.0))
    return weights


def gap_metrics(sampler: PerToken, trainer: PerToken, masks: PerToken) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's over sampled tokens.

    Mean, max and std of |Δ log p| and |Δ p|, and the k3 estimate of KL(sampler ‖ trainer) on the
    sampler's own tokens (http://joschu.net/blog/kl-approx.html).
    """
    sampled = _chosen(sampler, masks).astype(np.float64)
    trained = _chosen(trainer, masks).astype(np.float64)
    if not len(sampled):
        return {}
    differences = {
        "logp": np.abs(sampled - trained),
        "probs": np.abs(np.exp(sampled) - np.exp(trained)),
    }
    metrics = {}
    for name, values in differences.items():
        metrics[f"training/rollout_{name}_diff_mean"] = float(values.mean())
        metrics[f"training/rollout_{name}_diff_max"] = float(values.max())
        metrics[f"training/rollout_{name}_diff_std"] = float(values.std())
    # k3 = e^d - 1 - d, as expm1: near 0, where nearly all tokens are, e^d - 1 would lose all
    # digits.
    d = np.clip(trained - sampled, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics["training/rollout_actor_kl_k3"] = float((np.expm1(d) - d).mean())
    return metrics


def weight_metrics(weights: PerToken, masks: PerToken, threshold: float) -> dict[str, float]:
    """Mean and extremes of the correction, and the share of tokens at the threshold."""
    chosen = _chosen(weights, masks)
    if not len(chosen):
        return {}
    return {
        "rollout_correction/mean": float(chosen.mean()),
        "rollout_correction/max": float(chosen.max()),
        "rollout_correction/min": float(chosen.min()),
        "rollout_correction/cut": float((chosen >= threshold).mean()),
    }


def _chosen(values: PerToken, masks: PerToken) -> np.ndarray:
    """Those of sampled tokens, one after the other."""
    return np.concatenate([v[mask] for v, mask in zip(values, masks, strict=True)])
