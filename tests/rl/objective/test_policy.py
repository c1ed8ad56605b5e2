"""Log-probabilities and updates of a tiny model: against transformers, and the same on every
layout.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.packing import Budget
from retool.model.build import ModelOptions
from retool.optim import AdamW, AdamWOptions
from retool.parallel.mesh import make_mesh
from retool.rl.objective.batching import Row, rank_batches
from retool.rl.objective.correction import gap_metrics
from retool.rl.objective.losses import LOSSES, Clip
from retool.rl.objective.policy import LossSpec, loss_sum, policy_logprobs, update_step
from tests.model.tiny import make
from tests.ranks import run_ranks

VOCAB = 64


def rows_of(seed=0, count=9):
    rng = np.random.default_rng(seed)
    rows = []
    for n in rng.integers(4, 24, count):
        mask = rng.random(n) < 0.6
        mask[:2] = False
        values = [np.where(mask, rng.normal(size=n), 0) for _ in range(2)]
        old = np.where(mask, -4 + 0.3 * rng.normal(size=n), 0)
        rows.append(
            Row(
                rng.integers(0, VOCAB, n).astype(np.int32),
                mask,
                old,
                old,
                values[0],
                np.where(mask, rng.random(n), 0),
                old + 0.1 * values[1],
            )
        )
    return rows


def model_on(mesh, folder):
    return load_pretrained(
        folder,
        mesh,
        ModelOptions(
            master_dtype=torch.float64, reduce_dtype=torch.float64, param_dtype=torch.float64
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make(path, "qwen2", vocab_size=VOCAB, num_hidden_layers=2)
    return str(path)


SPECS = {
    "vanilla": LossSpec(
        clip=Clip(0.2, 0.28, 3.0),
        temperature=0.7,
        entropy_coeff=0.01,
        use_kl=True,
        kl_coef=0.1,
        kl_kind="k3+",
    ),
    "gspo": LossSpec(loss=LOSSES["gspo"], clip=Clip(0.05, 0.05)),
    "cispo": LossSpec(loss=LOSSES["cispo"], clip=Clip(0.2, 0.3), temperature=1.3),
}


def run_layout(folder: str, sp: int, budget: Budget, name: str):
    """One update on whatever processes there are: (old log-probs, loss metrics, gradient norm,
    weights' checksum).
    """
    mesh = make_mesh(sp, device="cpu")
    model = model_on(mesh, folder)
    rows = rows_of()
    samples = [Sample(row.tokens, row.mask) for row in rows]
    logp, entropy = policy_logprobs(model, samples, SPECS[name].temperature, budget, entropy=True)
    batches = rank_batches(rows, "seq-mean-token-mean", 24, mesh.dp_rank, mesh.dp, mesh.sp, budget)
    done = update_step(model, AdamW(model, AdamWOptions()), batches, SPECS[name], lr=1e-3)
    again, _ = policy_logprobs(model, samples, 1.0, budget)
    return (
        np.concatenate(logp),
        np.concatenate(entropy),
        done.metrics,
        done.grad_norm,
        np.concatenate(again),
    )


@pytest.mark.parametrize("name", SPECS)
def test_no_layout_changes_the_update(folder, name) -> None:
    reference = run_layout(folder, 1, Budget(10_000), name)
    others = [run_layout(folder, 1, Budget(30), name), run_layout(folder, 1, Budget(None, 1), name)]
    for world, sp in {"gspo": ((2, 2), (3, 1)), "vanilla": ((2, 1),), "cispo": ()}[name]:
        others += run_ranks(run_layout, world, folder, sp, Budget(16), name)
    for logp, entropy, metrics, norm, again in others:
        assert np.allclose(logp, reference[0], atol=1e-6) and np.allclose(
            entropy, reference[1], atol=1e-6
        )
        assert norm == pytest.approx(reference[3], rel=1e-6) and np.allclose(
            again, reference[4], atol=1e-6
        )
        for key, value in reference[2].items():
            assert metrics[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert reference[3] > 1e-3


def test_against_a_dense_computation(folder) -> None:
    """Loss and gradient of the head's weight from whole logits, written anew: temperature, clip,
    entropy, KL, correction.
    """
    model = model_on(make_mesh(device="cpu"), folder)
    rows = rows_of(3, 5)
    spec = SPECS["vanilla"]
    near, _ = policy_logprobs(
        model, [Sample(r.tokens, r.mask) for r in rows], spec.temperature, Budget(30)
    )
    noise = np.random.default_rng(9)
    rows = [
        replace(
            r,
            old=n + 0.3 * r.mask * noise.normal(size=len(r)),
            ref=n + 0.5 * r.mask * noise.normal(size=len(r)),
        )
        for r, n in zip(rows, near, strict=True)
    ]
    total = sum(int(row.mask.sum()) for row in rows)
    expected = torch.zeros((), dtype=torch.float64)
    logps = []
    for row in rows:
        logits = (
            model(pack([Sample(row.tokens, row.mask)]), lambda hidden, weight: hidden @ weight.t())[
                :-1
            ]
            / spec.temperature
        )
        dist = F.log_softmax(logits, -1)
        logp = dist.gather(1, torch.tensor(row.tokens[1:], dtype=torch.int64)[:, None])[:, 0]
        entropy = -(dist.exp() * dist).sum(-1)
        mask = torch.tensor(row.mask[1:])
        adv, old, ref = (
            torch.tensor(np.float32(v[1:]).astype(np.float64))
            for v in (row.advantage, row.old, row.ref)
        )
        # the batch holds float32: the product of advantage and correction is rounded there too
        adv = (adv.float() * torch.tensor(np.float32(row.correction[1:]))).double()
        ratio = (logp - old).exp()
        pg = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.28))
        pg = torch.where(adv < 0, torch.min(pg, -adv * 3.0), pg)
        k2 = 0.5 * (ref - logp).square()
        k3 = (ref - logp).exp() - 1 - (ref - logp)
        token = pg - spec.entropy_coeff * entropy + spec.kl_coef * (k2 - k2.detach() + k3.detach())
        expected = expected + token[mask].sum() / total
        logps.append(torch.where(mask, logp, 0).detach().numpy())
    model.zero_grad()
    expected.backward()
    gradient = model.grad.clone()
    batches = rank_batches(rows, "token-mean", 24, 0, 1, 1, Budget(30))
    model.zero_grad()
    got = 0.0
    for batch in batches:
        loss, _ = loss_sum(model, batch, spec)
        loss.backward()
        got += float(loss.detach())
    assert got == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float((model.grad - gradient).norm() / gradient.norm()) < 1e-6
    found, _ = policy_logprobs(
        model, [Sample(r.tokens, r.mask) for r in rows], spec.temperature, Budget(30)
    )
    assert all(
        np.allclose(f[1:], expected_logp, atol=1e-5)
        for f, expected_logp in zip(found, logps, strict=True)
    )


def test_what_is_told_per_token_does_not_depend_on_how_the_loss_is_averaged(folder) -> None:
    model = model_on(make_mesh(device="cpu"), folder)
    rows = rows_of(7)
    samples = [Sample(row.tokens, row.mask) for row in rows]
    present, _ = policy_logprobs(model, samples, 1.0, Budget(10_000))
    noise = np.random.default_rng(8)
    old = [p + 0.3 * noise.normal(size=len(p)) for p in present]
    rows = [replace(r, old=o, correction=np.ones(len(r))) for r, o in zip(rows, old, strict=True)]
    log_ratio = np.concatenate([(p - r.old)[r.mask] for p, r in zip(present, rows, strict=True)])
    advantages = np.concatenate([row.advantage[row.mask] for row in rows])
    ratio = np.exp(log_ratio)
    stopped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    for mean in ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        told = [
            loss_sum(model, batch, LossSpec())[1]
            for batch in rank_batches(rows, mean, 100, 0, 1, 1, Budget(60))
        ]
        clipped, kl = (
            sum(float(metrics[name]) for metrics in told)
            for name in ("actor/pg_clipfrac", "actor/ppo_kl")
        )
        assert clipped == pytest.approx(stopped.mean(), rel=1e-6)
        assert kl == pytest.approx(-log_ratio.mean(), abs=1e-6)


def test_a_step_makes_good_tokens_likelier(folder) -> None:
    model = model_on(make_mesh(device="cpu"), folder)
    rows = rows_of()
    samples = [Sample(row.tokens, row.mask) for row in rows]
    before, _ = policy_logprobs(model, samples, 1.0, Budget(100))
    signs = [np.where(row.mask, 1.0 if i % 2 else -1.0, 0) for i, row in enumerate(rows)]
    rows = [
        Row(r.tokens, r.mask, b, b, a, r.mask.astype(float))
        for r, b, a in zip(rows, before, signs, strict=True)
    ]
    batches = rank_batches(rows, "token-mean", 24, 0, 1, 1, Budget(100))
    done = update_step(model, AdamW(model, AdamWOptions()), batches, LossSpec(), lr=1e-3)
    # on-policy: the ratio is 1
    assert abs(done.metrics["actor/ppo_kl"]) < 1e-5 and done.metrics["actor/pg_clipfrac"] == 0
    after, _ = policy_logprobs(model, samples, 1.0, Budget(100))
    assert sum(float((s * (a - b)).sum()) for s, a, b in zip(signs, after, before, strict=True)) > 0


def test_on_policy_needs_no_old_log_probabilities(folder) -> None:
    """The same update and the same measured gap as with a forward pass of its own before it."""
    rows = rows_of(5, 6)
    spec = LossSpec(temperature=0.8)
    noise = np.random.default_rng(4)
    samples = [Sample(row.tokens, row.mask) for row in rows]
    found = []
    for on_policy in (False, True):
        model = model_on(make_mesh(device="cpu"), folder)
        present, entropy = policy_logprobs(
            model, samples, spec.temperature, Budget(40), entropy=True
        )
        if not on_policy:
            sampler = [
                p + 0.01 * r.mask * noise.normal(size=len(r))
                for p, r in zip(present, rows, strict=True)
            ]
        mine = [
            replace(r, old=s if on_policy else p, sampler=s, correction=r.mask.astype(float))
            for r, s, p in zip(rows, sampler, present, strict=True)
        ]
        batches = rank_batches(mine, "token-mean", 24, 0, 1, 1, Budget(40))
        done = update_step(
            model,
            AdamW(model, AdamWOptions()),
            batches,
            replace(spec, on_policy=on_policy),
            lr=1e-3,
        )
        found.append((done, model.master.clone()))
    masks = [row.mask for row in rows]
    (before, _), (after, _) = found
    for name, value in gap_metrics(sampler, present, masks).items():
        assert after.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
    assert after.metrics["actor/entropy"] == pytest.approx(
        float(np.concatenate([e[m] for e, m in zip(entropy, masks, strict=True)]).mean()), rel=1e-5
    )
    assert after.metrics["actor/pg_loss"] == pytest.approx(
        before.metrics["actor/pg_loss"], abs=1e-6
    )
    assert (
        after.grad_norm == pytest.approx(before.grad_norm, rel=1e-5)
        and float((found[0][1] - found[1][1]).abs().max()) < 1e-5
    )
