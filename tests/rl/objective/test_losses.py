"""Losses against hand-checked numbers, an independent dense computation, and themselves on every
slicing.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retool.rl.objective.losses import (
    LOSSES,
    Clip,
    LossInputs,
    cispo,
    gspo,
    kl,
    sequence_means,
    sequence_sums,
    token_weights,
    vanilla,
    weighted_sum,
)

ONE = torch.ones(1, dtype=torch.float64)
CLIP = Clip(low=0.2, high=0.28, c=3.0)


def inputs_of(logp, old, advantages, weights, clip=CLIP, mean=None):
    """What a loss gets: everything sampled that has a weight."""
    return LossInputs(
        logp_T=logp,
        old_T=old,
        sampler_T=old,
        advantages_T=advantages,
        weights_T=weights,
        sampled_T=weights != 0,
        token_share=1 / len(weights),
        clip=clip,
        sequence_log_ratio_T=mean,
    )


def at(ratio, advantage, loss=vanilla, clip=CLIP):
    """(loss, d loss / d logp, metrics) of one token."""
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value, metrics = loss(inputs_of(logp, 0 * ONE, advantage * ONE, ONE, clip, logp.detach()))
    value.backward()
    return float(value), float(logp.grad), {key: float(v) for key, v in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped", "lower"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.5, 2.0, -2.56, 0.0, 1, 0),  # clipped at 1.28
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # a good token that became rarer is not clipped
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # a bad token that became commoner is not clipped …
        (4.0, -2.0, 6.0, 0.0, 0, 1),  # … up to c
    ],
)
def test_vanilla_by_hand(ratio, advantage, loss, slope, clipped, lower) -> None:
    value, gradient, metrics = at(ratio, advantage)
    assert (value, gradient) == (pytest.approx(loss, abs=1e-12), pytest.approx(slope, abs=1e-12))
    assert (metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]) == (clipped, lower)
    assert metrics["actor/ppo_kl"] == pytest.approx(-math.log(ratio)) and metrics[
        "actor/pg_loss"
    ] == pytest.approx(loss)


def test_cispo_by_hand() -> None:
    # clipped, and still with a gradient
    assert at(1.5, 2.0, cispo)[:2] == pytest.approx((-1.28 * 2 * math.log(1.5), -2.56))
    assert at(0.5, -2.0, cispo)[:2] == pytest.approx((0.8 * 2 * math.log(0.5), 1.6))


def test_gspo_by_hand() -> None:
    """Log ratios 0.3 and -0.1: the sequence's ratio is e^0.1 for both tokens, each with half its
    gradient.
    """
    logp = torch.tensor([0.3, -0.1], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(2, dtype=torch.float64)
    sampled = torch.ones(2, dtype=torch.bool)
    sequences = torch.zeros(2, dtype=torch.int64)
    means = sequence_means(sequence_sums(logp, old, sampled, sequences, 1), sequences)
    assert means.tolist() == pytest.approx([0.1, 0.1])
    advantages = torch.full((2,), 1.5, dtype=torch.float64)
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    value, _ = gspo(inputs_of(logp, old, advantages, weights, Clip(0.2, 0.28), means))
    value.backward()
    assert float(value) == pytest.approx(
        -1.5 * math.exp(0.1)
    ) and logp.grad.tolist() == pytest.approx([-0.75 * math.exp(0.1)] * 2)
    assert at(4.0, -2.0, gspo)[0] == pytest.approx(8.0)  # no dual clip


def test_huge_ratios_stay_finite() -> None:
    for loss in LOSSES.values():
        logp = torch.tensor([500.0, -500.0], requires_grad=True)
        advantages = torch.tensor([-1.0, 1.0])
        value, _ = loss.function(
            inputs_of(logp, torch.zeros(2), advantages, torch.ones(2), mean=logp.detach())
        )
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(logp.grad).all()


def test_tokens_of_weight_0_have_no_say() -> None:
    for loss in LOSSES.values():
        logp = torch.tensor([0.1, float("-inf")], requires_grad=True)
        tensors = [logp, torch.zeros(2), torch.ones(2), torch.tensor([1.0, 0.0])]
        value, _ = loss.function(inputs_of(*tensors, mean=torch.zeros(2)))
        alone, _ = loss.function(inputs_of(*(t[:1] for t in tensors), mean=torch.zeros(1)))
        assert float(value) == float(alone)


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [  # d = ref - logp = 0.5; slopes with respect to logp
        ("k1", -0.5, 1.0),
        ("abs", 0.5, -1.0),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("k1+", -0.5, -0.5),
        ("k2+", 0.125, -0.5),
        ("k3+", math.exp(0.5) - 1.5, -0.5),
        ("abs+", 0.5, -0.5),
    ],
)
def test_kl_by_hand(kind, value, slope) -> None:
    logp = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
    out = kl(logp, torch.tensor([-1.0], dtype=torch.float64), kind).sum()
    out.backward()
    assert (float(out), float(logp.grad)) == (pytest.approx(value), pytest.approx(slope))


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("k1", 30.0, 1.0),
        ("abs", 30.0, 1.0),
        ("k2", 450.0, 30.0),
        ("k1+", 30.0, 30.0),
        ("k3+", 29.0, 30.0),
    ],
)
def test_a_token_far_from_the_reference_keeps_its_gradient(kind, value, slope) -> None:
    """d = ref - logp = -30.

    Only k3 is bounded, as e^d overflows on its other side; its own gradient there is as good as 0.
    """
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    out = kl(logp, torch.tensor([-31.0], dtype=torch.float64), kind).sum()
    out.backward()
    bounded = kind == "k3+"
    assert float(out) == pytest.approx(10.0 if bounded else value) and float(
        logp.grad
    ) == pytest.approx(slope)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_are_unbiased(kind) -> None:
    """Their mean under the policy, exactly summed over a small vocabulary, is the KL divergence."""
    p = torch.softmax(torch.tensor([0.3, -1.0, 0.8, 0.1]).double(), 0)
    q = torch.softmax(torch.tensor([0.0, 0.2, 0.5, -0.4]).double(), 0)
    assert float((p * kl(p.log(), q.log(), kind)).sum()) == pytest.approx(
        float((p * (p.log() - q.log())).sum())
    )


def test_the_gradient_of_plus_is_that_of_the_kl() -> None:
    """Its expectation under the policy: Σ p ∇(k2) = ∇ KL."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.tensor([0.0, 0.2, 0.5, -0.4]).double(), 0)
    logp = torch.log_softmax(logits, 0)
    (expected,) = torch.autograd.grad((logp.exp() * (logp - q)).sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad((logp.detach().exp() * kl(logp, q, "k3+")).sum(), logits)
    assert got.tolist() == pytest.approx(expected.tolist())


def dense(mask, values, mode, longest):
    """Aggregation as the literature writes it, on padded matrices; sequences without a sampled
    token left out.
    """
    mask, values = mask[mask.any(1)], values[mask.any(1)]
    sums = (mask * values).sum(1)
    return {
        "token-mean": (mask * values).sum() / mask.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-mean": (sums / mask.sum(1)).mean(),
        "seq-mean-token-sum-norm": sums.mean() / longest,
    }[mode]


MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def test_token_weights_by_hand() -> None:
    masks = [np.array([False, True, True]), np.array([False, True]), np.array([False])]
    assert [w.tolist() for w in token_weights(masks, "token-mean", 10)] == [
        [0, 1 / 3, 1 / 3],
        [0, 1 / 3],
        [0],
    ]
    assert [w.tolist() for w in token_weights(masks, "seq-mean-token-sum", 10)] == [
        [0, 0.5, 0.5],
        [0, 0.5],
        [0],
    ]
    assert [w.tolist() for w in token_weights(masks, "seq-mean-token-mean", 10)] == [
        [0, 0.25, 0.25],
        [0, 0.5],
        [0],
    ]
    assert [w.tolist() for w in token_weights(masks, "seq-mean-token-sum-norm", 10)] == [
        [0, 0.05, 0.05],
        [0, 0.05],
        [0],
    ]


def dense_vanilla(logp, old, adv, clip):
    r = np.exp(np.clip(logp - old, -20, 20))
    out = np.maximum(-adv * r, -adv * np.clip(r, 1 - clip.low, 1 + clip.high))
    return np.where(adv < 0, np.minimum(out, -adv * clip.c), out)


def dense_gspo(logp, old, adv, mask, clip):
    s = np.exp(((logp - old) * mask).sum(1) / np.maximum(mask.sum(1), 1))[:, None]
    return np.maximum(-adv * s, -adv * np.clip(s, 1 - clip.low, 1 + clip.high))


def dense_cispo(logp, old, adv, clip):
    return -np.clip(np.exp(logp - old), 1 - clip.low, 1 + clip.high) * adv * logp


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_any_slicing_gives_the_dense_loss_and_gradient(name, mode, rng) -> None:
    """Six sequences, one of them empty, flattened, shuffled and cut into uneven slices: the sums
    agree to 1e-12 in float64.
    """
    mask = rng.random((6, 12)) < 0.6
    mask[4] = False
    logp = rng.normal(-1, 0.6, mask.shape)
    old = rng.normal(-1, 0.6, mask.shape)
    adv = np.repeat(rng.normal(size=(6, 1)), 12, 1)
    table = {
        "vanilla": dense_vanilla(logp, old, adv, CLIP),
        "gspo": dense_gspo(logp, old, adv, mask, CLIP),
        "cispo": dense_cispo(logp, old, adv, CLIP),
    }
    expected = dense(mask, table[name] * np.ones_like(logp), mode, 12)

    weights = np.concatenate(token_weights(list(mask), mode, 12))
    order = rng.permutation(mask.size)
    flat = {
        k: torch.tensor(v.reshape(-1)[order])
        for k, v in (("logp", logp), ("old", old), ("adv", adv), ("w", weights), ("mask", mask))
    }
    sequences = torch.tensor(np.repeat(np.arange(6), 12)[order])
    gradients = []
    for cuts in ([72], [5, 30, 37], [1] * 72):
        leaf = flat["logp"].clone().requires_grad_()
        parts = [torch.arange(72)[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
        sums = sum(
            sequence_sums(leaf[p], flat["old"][p], flat["mask"][p], sequences[p], 6) for p in parts
        )
        total = 0.0
        for p in parts:
            means = sequence_means(sums, sequences[p])
            tensors = [leaf[p], flat["old"][p], flat["adv"][p], flat["w"][p]]
            value, _ = LOSSES[name].function(inputs_of(*tensors, mean=means))
            value.backward()
            total += float(value)
        assert total == pytest.approx(expected, abs=1e-12)
        gradients.append(leaf.grad)
    for other in gradients[1:]:
        assert torch.allclose(other, gradients[0], rtol=0, atol=1e-14)


def test_on_policy_the_gradient_is_reinforce(rng) -> None:
    """With old = logp every loss has the gradient -A·∇logp."""
    logp = torch.tensor(rng.normal(size=9))
    adv = torch.tensor(rng.normal(size=9))
    for loss in LOSSES.values():
        leaf = logp.clone().requires_grad_()
        weights = torch.full((9,), 1 / 9, dtype=torch.float64)
        inputs = inputs_of(leaf, logp, adv, weights, mean=torch.zeros(9, dtype=torch.float64))
        loss.function(inputs)[0].backward()
        assert leaf.grad.tolist() == pytest.approx((-adv / 9).tolist())


def test_a_value_without_weight_is_in_no_mean() -> None:
    values = torch.tensor([1.0, 3.0, float("nan")])
    assert float(weighted_sum(values, torch.tensor([0.5, 0.5, 0.0]))) == 2.0
