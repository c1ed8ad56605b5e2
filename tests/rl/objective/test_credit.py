"""What is trained where: truncated answers, and rewards of turns on their own tokens.

Each against a dense computation in float64, written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from retool.parallel.fsdp import Sharded
from retool.rl.config.algorithm import AlgorithmConfig
from retool.rl.objective.advantages import ESTIMATORS, place_turn_rewards
from retool.rl.objective.experience import Experience, ExperienceOptions, make_experience
from retool.rl.reward.source import RewardSource, find_several
from retool.rl.types import Group, Scored, Stop
from tests.rl.conftest import make_prompt, make_trajectory
from tests.rl.objective.test_experience import BUDGET, STEP, TEMPERATURE, models
from tests.rl.objective.test_policy import VOCAB
from tests.rl.test_api import improve
from tests.rl.test_preflight import check, said

__all__ = ["models"]

# Of the response; a turn of the model, a tool's answer, a turn …
MASKS = ([1, 1, 0, 1, 1, 1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 1])
GIVEN = ((0.5, 0.0, -1.0), (0.25, 2.0), ())
SCORES = (1.0, 3.0, 0.5)
STOPS = (Stop.NO_CALL, Stop.LENGTH, Stop.NO_CALL)


def groups() -> list[Group]:
    """Two prompts with three answers each; of the second's, all scores are others."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(2):
        prompt = make_prompt(index, rng.integers(0, VOCAB, 4))
        members = []
        for k, mask in enumerate(MASKS):
            trajectory = make_trajectory(
                prompt,
                k,
                rng.integers(0, VOCAB, len(mask)),
                mask,
                stop=STOPS[k],
                version=STEP,
                turn_rewards=GIVEN[k],
            )
            score = SCORES[k] * (1 + index)
            members.append(Scored(trajectory, score, score))
        found.append(Group(prompt, members))
    return found


def made_by(
    models: list[Sharded], estimator: str, algorithm: AlgorithmConfig, weight: float = 0.0
) -> Experience:
    options = ExperienceOptions(
        algorithm,
        ESTIMATORS[estimator],
        TEMPERATURE,
        BUDGET,
        STEP,
        one_update=True,
        turn_weight=weight,
    )
    return make_experience(groups(), models[0], None, options, {})


def dense_returns(weight: float, gamma: float) -> list[np.ndarray]:
    """Returns of every sampled token, by the definition: a double sum over the response."""
    found = []
    for group in range(2):
        for mask, given, score in zip(MASKS, GIVEN, SCORES, strict=True):
            reward = score * (1 + group)
            places = [i for i, on in enumerate(mask) if on]
            ends = [i for i in places if i + 1 == len(mask) or not mask[i + 1]]
            tokens = dict.fromkeys(places, 0.0)
            for end, value in zip(ends, given, strict=False):
                tokens[end] += weight * value
            tokens[places[-1]] += reward - weight * sum(given)
            returns = np.zeros(4 + len(mask))
            for k, i in enumerate(places):
                later = enumerate(places[k:])
                returns[4 + i] = sum(gamma**steps * tokens[j] for steps, j in later)
            found.append(returns)
    return found


@pytest.mark.parametrize(("weight", "gamma"), [(1.0, 1.0), (0.5, 0.9), (0.0, 0.9)])
def test_returns_with_rewards_where_they_were_given(
    models: list[Sharded], weight: float, gamma: float
) -> None:
    made = made_by(models, "reinforce_plus_plus", AlgorithmConfig(gamma=gamma), weight)
    returns = dense_returns(weight, gamma)
    masks = [np.array([0] * 4 + mask, bool) for mask in MASKS] * 2
    sampled = np.concatenate([r[m] for r, m in zip(returns, masks, strict=True)])
    scale = np.sqrt(sampled.var(ddof=1) + 1e-8)
    for row, mask, values in zip(made.rows, masks, returns, strict=True):
        wanted = np.where(mask, (values - sampled.mean()) / scale, 0.0)
        np.testing.assert_allclose(row.advantage, wanted, rtol=0, atol=1e-12)
    assert made.metrics["critic/returns/mean"] == pytest.approx(sampled.mean(), abs=1e-12)


def test_the_sum_of_rewards_stays_and_turns_must_be_there() -> None:
    mask = np.array([0, 1, 1, 0, 1], bool)
    np.testing.assert_allclose(place_turn_rewards((0.25, -1.0), 3.0, mask), [0, 0, 0.25, 0, 2.75])
    np.testing.assert_allclose(place_turn_rewards((), 3.0, mask), [0, 0, 0, 0, 3.0])
    joined = place_turn_rewards((0.25, 0.5, -1.0), 3.0, mask, joins=(2,))
    np.testing.assert_allclose(joined, [0, 0.25, 0.5, 0, 2.25])
    with pytest.raises(ValueError, match="3 turns of a trajectory were given rewards, and 2 were"):
        place_turn_rewards((1.0, 2.0, 3.0), 3.0, mask)


def test_a_truncated_answer_counts_in_its_group_and_is_not_trained(models: list[Sharded]) -> None:
    made = made_by(models, "grpo", AlgorithmConfig(mask_truncated=True))
    assert made.trained == [0, 2, 3, 5]
    assert made.metrics["mask/truncated"] == 2
    trained = []
    for group in range(2):
        scores = np.array(SCORES) * (1 + group)  # of all three
        normal = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
        for k in (0, 2):
            row = made.rows[3 * group + k]
            wanted = np.where([0] * 4 + MASKS[k], normal[k], 0.0)
            np.testing.assert_allclose(row.advantage, wanted, rtol=0, atol=1e-12)
            trained += [normal[k]] * sum(MASKS[k])
    assert made.metrics["critic/advantages/mean"] == pytest.approx(np.mean(trained), abs=1e-12)
    everything = made_by(models, "grpo", AlgorithmConfig())
    assert everything.trained == list(range(6)) and "mask/truncated" not in everything.metrics


@pytest.mark.slow
def test_a_run_of_truncated_answers_trains_nothing_and_says_so(work: Path, tmp_path: Path) -> None:
    """Two tokens are too few for any of them; no step fails of it."""
    told: list[Mapping[str, float]] = []

    def short(completion: str) -> float:
        return -float(len(completion))

    with pytest.raises(ValueError, match="all answers of a step ran out of tokens"):
        improve(
            work,
            tmp_path / "run",
            max_completion_length=2,
            reward=short,
            # The likeliest tokens, none of which ends an answer
            options={
                "algorithm.mask_truncated": True,
                "actor_rollout_ref.rollout.temperature": 0.01,
            },
            on_step=lambda step, metrics: told.append(metrics),
        )
    assert [metrics["mask/truncated"] for metrics in told] == [16]  # the last ends the run first
    assert not any(key.startswith("actor/pg_") for metrics in told for key in metrics)


def test_how_much_of_a_turns_reward_is_in_the_score() -> None:
    assert RewardSource("environment").turn_weight == 1.0
    assert RewardSource("environment", "my.py").turn_weight == 0.0
    parts = (RewardSource("math"), RewardSource("environment", weight=0.5))
    assert RewardSource("both", parts=parts).turn_weight == 0.5
    assert find_several(("math", "boxed"), ()).turn_weight == 0.0


def test_credit_for_turns_needs_who_looks_at_tokens_and_a_reward_of_turns(
    work: Path, tmp_path: Path
) -> None:
    credit = ["trainer.device=cpu", "algorithm.credit_turns=true"]
    text = said(check(work, tmp_path / "out", *credit))
    assert "algorithm.adv_estimator=grpo judges an answer by the sum of its rewards" in text
    assert "Use reinforce_plus_plus or an estimator of your own" in text
    assert "the reward math doesn't count what turns are given" in text
    more = ["algorithm.adv_estimator=reinforce_plus_plus"]
    (fault,) = check(work, tmp_path / "out", *credit, *more).faults
    assert "add environment to reward_model.functions" in fault.remedy
