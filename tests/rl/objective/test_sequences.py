"""Trajectories of several sequences: a model is given each by itself, everything else counts the
trajectory.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retool.batch import Sample
from retool.data.packing import Budget
from retool.rl.metrics import length_metrics
from retool.rl.objective.advantages import grpo
from retool.rl.objective.batching import Row, rank_batches
from retool.rl.objective.losses import token_weights
from retool.rl.objective.policy import policy_logprobs
from retool.rl.types import Group, Scored
from tests.rl.conftest import make_prompt, make_trajectory
from tests.rl.objective.test_experience import BUDGET, STEP, TEMPERATURE, made_of, models
from tests.rl.objective.test_policy import VOCAB

__all__ = ["models"]
# Of each trajectory of a group: its sequences, each a prompt's length and what follows it
SHAPES = [[(4, "mm.m")], [(4, "m.mm"), (9, "mmm")], [(4, "m"), (5, "mm"), (7, "m..m")]]


def cut_trajectory(rng, sample):
    shape = SHAPES[sample]
    masks = ["." * length + response for length, response in shape]
    mask = np.array([sign == "m" for part in masks for sign in part])
    prompt = make_prompt(0, rng.integers(0, VOCAB, 4))
    ends = np.cumsum([len(part) for part in masks])
    response = rng.integers(0, VOCAB, len(mask) - 4)
    made = make_trajectory(prompt, sample, response, mask[4:], -3.0, version=STEP)
    return replace(made, cuts=tuple(int(end) for end in ends[:-1]))


def group():
    rng = np.random.default_rng(3)
    members = [Scored(cut_trajectory(rng, k), float(k), float(k * k)) for k in range(3)]
    return Group(members[0].trajectory.prompt, members)


def test_each_sequence_meets_the_model_by_itself_and_shares_its_trajectory_s_advantage(
    models,
) -> None:
    found = [member.trajectory for member in group().members]
    made = made_of(models, [group()], one_update=False, reference=models[1])
    alone = [Sample(t.tokens[span], t.mask[span]) for t in found for span in t.spans]
    for k, values in enumerate(([row.old for row in made.rows], [row.ref for row in made.rows])):
        expected = policy_logprobs(models[k], alone, TEMPERATURE, BUDGET)[0]
        assert np.allclose(np.concatenate(values), np.concatenate(expected), atol=1e-5)
    # Three trajectories in six sequences: a group of three
    advantages = grpo(np.array([0.0, 1.0, 4.0]), np.zeros(3))
    for row, advantage, trajectory in zip(made.rows, advantages, found, strict=True):
        assert np.allclose(row.advantage, np.where(trajectory.mask, advantage, 0))
        assert row.cuts == trajectory.cuts
    assert [len(t.spans) for t in found] == [1, 2, 3] and made.groups == [0, 0, 0]


MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("mode", MODES)
def test_a_trajectory_has_one_share_of_the_loss_on_any_number_of_ranks(mode) -> None:
    rng = np.random.default_rng(5)
    rows = []
    for k in (2, 0, 1):
        made = cut_trajectory(rng, k)
        value = np.where(made.mask, rng.random(len(made)), 0.0)
        rows.append(Row(made.tokens, made.mask, value, value, value, value, cuts=made.cuts))
    shares = token_weights([row.mask for row in rows], mode, 10)
    expected = sum(
        float((share * row.advantage).sum()) for share, row in zip(shares, rows, strict=True)
    )
    for dp in (1, 2, 3):
        ranks = [rank_batches(rows, mode, 10, rank, dp, 1, Budget(12)) for rank in range(dp)]
        assert len({len(batches) for batches in ranks}) == 1, "collectives are equally many"
        batches = [batch for batches in ranks for batch in batches]
        total = sum(float((batch.weights * batch.advantages).sum()) for batch in batches)
        assert total == pytest.approx(expected)
        lengths = sorted(n for batch in batches for n in batch.pack.seqlens if n > 1)
        wanted = sorted(span.stop - span.start for row in rows for span in row.spans)
        assert [n for n in lengths if n >= 5] == wanted


def test_lengths_are_of_sequences_and_of_the_trajectory() -> None:
    members = group().members
    lengths = [member.trajectory.response_lengths for member in members]
    assert lengths == [[4], [4, 3], [1, 2, 4]]
    metrics = length_metrics(members, max_response=5, max_prompt=9)
    assert metrics["response_length/max"] == 7 and metrics["response_length/clip_ratio"] == 0
    assert metrics["agent/sequences/max"] == 3 and metrics["agent/sequences/mean"] == 2
    assert "agent/sequences/max" not in length_metrics(members[:1], 5, 9)
