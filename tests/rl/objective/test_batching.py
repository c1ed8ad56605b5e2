"""Packing with what belongs to each token, dynamic sampling, the sampler's correction, metrics and
validation statistics.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from retool.data.packing import Budget, plan_step
from retool.rl.metrics import advantage_metrics, length_metrics, score_metrics, tool_metrics
from retool.rl.objective.batching import (
    Row,
    make_batch,
    mini_batches,
    rank_batches,
    shift,
    unshift,
)
from retool.rl.objective.correction import correction_weights, gap_metrics, weight_metrics
from retool.rl.objective.filter import Collection, add, begin, complete, has_signal, take
from retool.rl.objective.losses import token_weights
from retool.rl.types import Group, Scored, Stop
from retool.rl.validate import draws, question_statistics, subset_sizes, validation_metrics
from tests.rl.conftest import make_prompt, make_trajectory


def row_of(rng, n, prompt=2, ref=False):
    mask = rng.random(n) < 0.7
    mask[:prompt] = False
    values = [np.where(mask, rng.normal(size=n), 0) for _ in range(5)]
    return Row(
        rng.integers(0, 50, n).astype(np.int32),
        mask,
        old=values[0],
        sampler=values[4],
        advantage=values[1],
        correction=np.abs(values[2]),
        ref=values[3] if ref else None,
    )


@pytest.mark.parametrize(
    ("quadratic_length", "shares"), [(1 << 30, [[10, 30], [20, 20]]), (1, [[10, 20, 20], [30]])]
)
def test_work_is_balanced_by_what_attention_costs(quadratic_length, shares) -> None:
    lengths = [30, 20, 20, 10]
    plan = plan_step(lengths, Budget(60, quadratic_length=quadratic_length), dp=2)
    assert sorted(sorted(lengths[i] for batch in rank for i in batch) for rank in plan) == shares


def test_everything_stands_where_its_label_does(rng) -> None:
    rows = [row_of(rng, n, ref=True) for n in (7, 3, 5)]
    weights = token_weights([row.mask for row in rows], "token-mean", 10)
    batch = make_batch(rows, weights, multiple=4, token_share=0.1)
    assert len(batch.pack.tokens) == 16 and batch.pack.seqlens == (7, 3, 5, 1)
    at = 0
    for number, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        for i in range(1, len(row)):
            here = at + i - 1
            assert (
                int(batch.pack.labels[here]) == row.tokens[i]
                and int(batch.sequences[here]) == number
            )
            for tensor, values in (
                (batch.old, row.old),
                (batch.sampler, row.sampler),
                (batch.advantages, row.advantage),
                (batch.correction, row.correction),
                (batch.weights, weight),
                (batch.ref, row.ref),
            ):
                assert float(tensor[here]) == np.float32(values[i])
        assert float(batch.weights[at + len(row) - 1]) == 0
        at += len(row)
    assert np.array_equal(batch.weights.numpy() > 0, batch.pack.weights.numpy() > 0)
    assert float(batch.weights.sum()) == pytest.approx(1.0)
    halves = [batch.slice(rank, 4) for rank in range(4)]
    assert np.concatenate([h.advantages for h in halves]).tolist() == batch.advantages.tolist()


def test_shift_and_back(rng) -> None:
    arrays = [np.concatenate([[0], rng.normal(size=n - 1)]).astype(np.float32) for n in (4, 1, 6)]
    back = unshift(shift(arrays, 13), [4, 1, 6])
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))


@pytest.mark.parametrize(("dp", "sp"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("budget", [Budget(16), Budget(None, 2), Budget(1000)])
def test_every_layout_holds_every_token_once_with_the_same_weight(rng, dp, sp, budget) -> None:
    rows = [row_of(rng, int(n)) for n in rng.integers(3, 20, 11)]
    everything = sorted(
        zip(
            *(
                np.concatenate([getattr(r, k)[r.mask] for r in rows])
                for k in ("tokens", "advantage")
            ),
            strict=True,
        )
    )
    made = [rank_batches(rows, "seq-mean-token-mean", 30, d, dp, sp, budget) for d in range(dp)]
    assert len({len(batches) for batches in made}) == 1
    batches = list(itertools.chain(*made))
    found = sorted(
        (int(b.pack.labels[i]), float(b.advantages[i]))
        for b in batches
        for i in np.flatnonzero(b.weights.numpy())
    )
    assert [t for t, _ in found] == [t for t, _ in everything]
    assert sum(float(b.weights.double().sum()) for b in batches) == pytest.approx(1.0, abs=1e-6)
    expected = np.concatenate(
        token_weights([r.mask for r in rows], "seq-mean-token-mean", 30)
    ) @ np.concatenate([r.advantage for r in rows])
    assert sum(
        float((b.weights.double() * b.advantages.double()).sum()) for b in batches
    ) == pytest.approx(expected, abs=1e-6)


def test_mini_batches_are_whole_groups() -> None:
    assert mini_batches([7, 7, 3, 3, 5, 5], 2) == [[0, 1, 2, 3], [4, 5]]
    assert mini_batches([1], 4) == [[0]] and mini_batches([], 4) == []


def group(index, scores, version=0, **info):
    prompt = make_prompt(index)
    members = [
        Scored(make_trajectory(prompt, i, version=version), s, s, {"acc": float(s > 0), **info})
        for i, s in enumerate(scores)
    ]
    return Group(prompt, members)


def test_dynamic_sampling() -> None:
    flat = group(0, [1, 1])
    mixed = group(1, [1, -1])
    also = group(2, [0.5, 1])
    assert [has_signal(g, "acc") for g in (flat, mixed, also)] == [False, True, False]
    assert has_signal(also, "score") and has_signal(also, "reward")
    with pytest.raises(ValueError, match=r"filter_groups.metric=bleu: .* it gives acc, reward"):
        has_signal(flat, "bleu")
    # Equal scores, whose deviation is 1e-16 by rounding: no signal.
    assert not any(
        has_signal(group(5, [score] * n), "score")
        for score in (-0.95, -0.8, 0.1)
        for n in (3, 6, 16)
    )
    c = add(begin([], 4), [flat, mixed, also], "acc")
    assert not complete(c, 2, 0) and complete(c, 2, 1)
    c = add(c, [group(3, [1, -1], 4), group(4, [-1, 1], 4)], "acc")
    assert complete(c, 2, 0)
    assert take(c, 2, keeps=False)[1] == []
    batch, kept = take(c, 2, keeps=True)
    assert [g.prompt.index for g in batch] == [1, 3] and [g.prompt.index for g in kept] == [4]
    assert c.metrics(len(kept)) == {
        "filter/gen_batches": 2,
        "filter/groups_sampled": 5,
        "filter/groups_no_signal": 2,
        "filter/groups_expired": 0,
        "filter/groups_reused": 0,
        "filter/groups_kept": 1,
        "filter/metric_mean": 0.7,
    }
    left_over = begin(kept, 5)
    assert complete(left_over, 1, 0)
    assert left_over.metrics(0) == {
        "filter/gen_batches": 0,
        "filter/groups_sampled": 0,
        "filter/groups_no_signal": 0,
        "filter/groups_expired": 0,
        "filter/groups_reused": 1,
        "filter/groups_kept": 0,
    }, "nothing was sampled: there is no mean of it"


def test_a_failed_judgement_is_a_wrong_answer_not_an_accuracy_of_the_floor() -> None:
    prompt = make_prompt()
    members = [
        Scored(make_trajectory(prompt, 0), -1.0, -1.0, {"failure": "timeout"}),
        Scored(make_trajectory(prompt, 1), 0.0, 0.0, {"acc": 0.0, "pred": "5", "bleu": 0.5}),
    ]
    assert not has_signal(Group(prompt, members), "acc") and has_signal(
        Group(prompt, members), "bleu"
    )
    assert (
        score_metrics(members)["critic/acc/mean"] == 0.0
        and score_metrics(members[:1]).get("critic/acc/mean") is None
    )
    found = validation_metrics([Group(prompt, members)])
    assert (
        found["val-core/numbers/acc/mean@2"] == 0.0
        and found["val-core/numbers/acc/maj@2/mean"] == 0.0
        and found["val-aux/numbers/score/mean@2"] == -0.5
    )
    words = Scored(make_trajectory(prompt), 0.75, 0.75, {"acc": "yes"})
    assert (
        words.accuracy == 0.75
        and validation_metrics([Group(prompt, [words])])["val-core/numbers/acc/mean@1"] == 0.75
    )


def test_kept_groups_live_one_step() -> None:
    kept = [group(0, [1, -1], version=4), group(1, [1, -1], version=3)]
    c = begin(kept, 5)
    assert [g.prompt.index for g in c.groups] == [0] and (c.expired, c.reused) == (1, 1)
    assert add(Collection(), kept, None).no_signal == 0


def test_correction_by_hand() -> None:
    mask = np.array([False, True, True, False])
    old = np.array([9.0, -1.0, -2.0, 9.0])
    behaviour = np.array([0, -1.5, -1.0, 0])
    assert correction_weights([old], [behaviour], [mask], None, 2.0)[0].tolist() == [0, 1, 1, 0]
    assert correction_weights([old], [behaviour], [mask], "token", 1.5)[0] == pytest.approx(
        [0, 1.5, np.exp(-1), 0]
    )
    assert correction_weights([old], [behaviour], [mask], "sequence", 2.0)[0] == pytest.approx(
        [0, np.exp(-0.5), np.exp(-0.5), 0]
    )
    weights = correction_weights([old], [behaviour], [mask], "token", 1.5)
    assert weight_metrics(weights, [mask], 1.5)["rollout_correction/cut"] == 0.5


def test_gap_by_hand() -> None:
    mask = np.array([False, True, True])
    sampler = np.array([0, np.log(0.5), np.log(0.25)])
    trainer = np.array([5, np.log(0.25), np.log(0.25)])
    gap = gap_metrics([sampler], [trainer], [mask])
    assert gap["training/rollout_logp_diff_mean"] == pytest.approx(np.log(2) / 2) and gap[
        "training/rollout_logp_diff_max"
    ] == pytest.approx(np.log(2))
    assert gap["training/rollout_probs_diff_mean"] == pytest.approx(0.125) and gap[
        "training/rollout_probs_diff_std"
    ] == pytest.approx(0.125)
    assert gap["training/rollout_actor_kl_k3"] == pytest.approx((0.5 - 1 + np.log(2)) / 2)
    assert (
        gap_metrics([sampler], [sampler], [mask])["training/rollout_actor_kl_k3"] == 0
        and gap_metrics([sampler], [sampler], [~mask & mask]) == {}
    )


def test_step_metrics_by_hand() -> None:
    prompt = make_prompt(ids=(1, 2, 3, 4))
    first = make_trajectory(
        prompt,
        response=(5, 6, 7),
        stop=Stop.LENGTH,
        num_turns=4,
        tool_calls=3,
        tool_errors=1,
        tool_timeouts=1,
        tool_seconds=6.0,
        tool_queue_seconds=1.5,
    )
    members = [
        Scored(first, 1.0, 0.5, {"acc": 1.0}),
        Scored(make_trajectory(prompt, response=(5,)), -1.0, -1.0, {"acc": 0.0}),
    ]
    scores = score_metrics(members)
    assert (
        scores["critic/score/mean"],
        scores["critic/rewards/mean"],
        scores["critic/acc/mean"],
    ) == (0.0, -0.25, 0.5)
    lengths = length_metrics(members, 3, 8)
    assert (
        lengths["response_length/mean"],
        lengths["response_length/clip_ratio"],
        lengths["prompt_length/max"],
    ) == (2.0, 0.5, 4.0)
    assert lengths["num_turns/max"] == 4 and lengths["prompt_length/clip_ratio"] == 0
    tools = tool_metrics(members)
    assert (
        tools["tool/calls"],
        tools["tool/errors"],
        tools["tool/timeouts"],
        tools["tool/latency"],
        tools["tool/queue_s"],
    ) == (3, 1, 1, 2.0, 0.5)
    assert {k: v for k, v in tools.items() if k.startswith("stop/") and v} == {
        "stop/length": 1,
        "stop/no_call": 1,
    } and len(tools) == 5 + 3 + len(Stop)  # and tools' failed opens, calls, closes
    values = advantage_metrics(
        [np.array([9, 1.0])], [np.array([9, 3.0])], [np.array([False, True])]
    )
    assert (values["critic/advantages/mean"], values["critic/returns/max"]) == (1.0, 3.0)


def test_subsets_and_draws() -> None:
    assert [subset_sizes(n) for n in (1, 2, 3, 8, 30)] == [
        [],
        [2],
        [2, 3],
        [2, 4, 8],
        [2, 4, 8, 16, 30],
    ]
    np.random.seed(42)
    assert draws(5, 3)[:4].tolist() == [
        np.random.choice(5, 3, replace=True).tolist() for _ in range(4)
    ]


def test_question_statistics_against_exact_expectations() -> None:
    """The bootstrap's means against their exact values: k of n drawn with replacement, n = 4 with
    one right answer.
    """
    stats = question_statistics([1.0, 0.0, 0.0, 0.0], ["7", "8", "8", "9"])
    assert stats["mean@4"] == 0.25 and stats["std@4"] == pytest.approx(math.sqrt(3) / 4)
    assert stats["best@4/mean"] == pytest.approx(1 - 0.75**4, abs=0.05) and stats[
        "best@2/mean"
    ] == pytest.approx(1 - 0.75**2, abs=0.05)
    assert stats["worst@2/mean"] == pytest.approx(1 / 16, abs=0.03)
    exact = np.mean([float(_vote(row)) for row in itertools.product(range(4), repeat=4)])
    assert (
        stats["maj@4/mean"] == pytest.approx(exact, abs=0.04)
        and stats["maj@2/mean"] < stats["best@2/mean"]
    )
    assert question_statistics([0.5], None) == {"mean@1": 0.5}


def _vote(row):
    answers = ["7", "8", "8", "9"]
    said = [answers[i] for i in row]
    return max(said, key=said.count) == "7"  # max takes the first of equals, as the vote does


def test_validation_metrics_by_source() -> None:
    groups = [group(0, [1.0, -1.0], pred="x"), group(1, [1.0, 1.0])]
    other = make_prompt(5, source="words")
    groups.append(Group(other, [Scored(make_trajectory(other, num_turns=6), 0.25, 0.25, {})]))
    found = validation_metrics(groups)
    assert (
        found["val-core/numbers/acc/mean@2"] == 0.75 and found["val-core/words/acc/mean@1"] == 0.25
    )
    assert (
        0.5 < found["val-core/numbers/acc/best@2/mean"] <= 1
        and "val-core/numbers/acc/maj@2/mean" in found
    )
    assert (
        found["val-aux/words/num_turns/mean"] == 6 and "val-aux/numbers/acc/worst@2/mean" in found
    )
    assert validation_metrics([replace(g) for g in groups]) == found
