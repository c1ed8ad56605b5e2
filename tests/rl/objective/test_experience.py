"""From groups to the rows of an update: whose log-probabilities are the old ones, KL in the reward,
the sampler's correction.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retool.batch import Sample
from retool.data.packing import Budget
from retool.parallel.mesh import make_mesh
from retool.rl.config.algorithm import AlgorithmConfig, RolloutCorrectionConfig
from retool.rl.objective.advantages import ESTIMATORS, grpo
from retool.rl.objective.experience import ExperienceOptions, make_experience
from retool.rl.objective.policy import policy_logprobs
from retool.rl.types import Group, Scored
from tests.model.tiny import make
from tests.rl.conftest import make_prompt, make_trajectory
from tests.rl.objective.test_policy import VOCAB, model_on

STEP = 7
TEMPERATURE = 0.7
BUDGET = Budget(40)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = []
    for name, width in (("policy", 0.2), ("reference", 0.3)):
        folder = tmp_path_factory.mktemp(name)
        make(folder, "qwen2", vocab_size=VOCAB, num_hidden_layers=1, initializer_range=width)
        found.append(model_on(make_mesh(device="cpu"), str(folder)))
    return found


def groups_of(*versions: int) -> list[Group]:
    """A group of three for each version, tool text in each member; the sampler's numbers are made
    up.
    """
    rng = np.random.default_rng(0)
    groups = []
    for index, version in enumerate(versions):
        prompt = make_prompt(index, rng.integers(0, VOCAB, 4))
        members = []
        for k in range(3):
            mask = np.array([*[True, True, False, True][: 2 + k], True])
            t = make_trajectory(
                prompt,
                k,
                rng.integers(0, VOCAB, len(mask)),
                mask,
                -rng.random(int(mask.sum())) - 3,
                version=version,
            )
            members.append(
                Scored(
                    replace(
                        t, logp_behaviour=np.where(t.mask, t.logp + 0.25, 0).astype(np.float32)
                    ),
                    float(k),
                    float(k),
                )
            )
        groups.append(Group(prompt, members))
    return groups


PLAIN = AlgorithmConfig()


def made_of(models, groups, algorithm=PLAIN, kl_coef=0.0, one_update=True, reference=None):
    options = ExperienceOptions(
        algorithm, ESTIMATORS["grpo"], TEMPERATURE, BUDGET, STEP, kl_coef, one_update
    )
    return make_experience(groups, models[0], reference, options, {})


def present(model, groups):
    found = [m.trajectory for g in groups for m in g.members]
    return found, policy_logprobs(
        model, [Sample(t.tokens, t.mask) for t in found], TEMPERATURE, BUDGET
    )[0]


def test_fresh_trajectories_get_the_trainers_old_ones_their_own(models) -> None:
    groups = groups_of(STEP, STEP - 1)
    made, (found, logp) = made_of(models, groups), present(models[0], groups)
    for i, (row, t) in enumerate(zip(made.rows, found, strict=True)):
        assert (
            np.array_equal(row.old, logp[i] if i < 3 else t.logp)
            and np.array_equal(row.mask, t.mask)
            and np.array_equal(row.sampler, t.logp)
            and row.correction.tolist() == t.mask.tolist()
        )
    assert made.groups == [0, 0, 0, 1, 1, 1] and not made.on_policy and not made.compared
    gap = np.abs(
        np.concatenate([(t.logp - p)[t.mask] for t, p in zip(found[:3], logp[:3], strict=True)])
    )
    assert made.metrics["training/rollout_logp_diff_mean"] == pytest.approx(
        float(gap.mean()), rel=1e-5
    )
    expected = grpo(np.array([0.0, 1, 2, 0, 1, 2]), np.array(made.groups))
    assert [row.advantage[row.mask][0] for row in made.rows] == pytest.approx(expected.tolist())


def test_when_old_log_probabilities_may_be_left_out(models) -> None:
    """One update, every group of the present weights, and nobody else who needs them."""
    fresh = groups_of(STEP)
    correction = RolloutCorrectionConfig
    cases = {
        "one update of fresh groups": (made_of(models, fresh), True),
        "two updates": (made_of(models, fresh, one_update=False), False),
        "an old group": (made_of(models, groups_of(STEP, STEP - 1)), False),
        "a correction": (
            made_of(
                models, fresh, AlgorithmConfig(rollout_correction=correction(rollout_is="token"))
            ),
            False,
        ),
        "KL in the reward": (
            made_of(models, fresh, AlgorithmConfig(use_kl_in_reward=True), reference=models[1]),
            False,
        ),
        "the sampler's": (
            made_of(
                models, fresh, AlgorithmConfig(rollout_correction=correction(bypass_mode=True))
            ),
            False,
        ),
    }
    assert {name: made.on_policy for name, (made, _) in cases.items()} == {
        name: wanted for name, (_, wanted) in cases.items()
    }
    bypassed = cases["the sampler's"][0]
    assert bypassed.compared and all(
        np.array_equal(r.old, m.trajectory.logp)
        for r, m in zip(bypassed.rows, fresh[0].members, strict=True)
    )
    stale = made_of(
        models,
        groups_of(STEP, STEP - 1),
        AlgorithmConfig(rollout_correction=correction(bypass_mode=True)),
    )
    assert not stale.compared, "the distance to older weights is no kernel's"


def test_correction_weighs_the_old_against_what_was_drawn_from(models) -> None:
    groups = groups_of(STEP, STEP - 1)
    made = made_of(
        models,
        groups,
        AlgorithmConfig(
            rollout_correction=RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=1.5)
        ),
    )
    for row, m in zip(made.rows, (m for g in groups for m in g.members), strict=True):
        wanted = np.minimum(np.exp(row.old.astype(np.float64) - m.trajectory.logp_behaviour), 1.5)
        assert row.correction == pytest.approx(np.where(row.mask, wanted, 0))
    # An old group's: top-p and top-k alone
    assert made.rows[3].correction[made.rows[3].mask] == pytest.approx(np.exp(-0.25))


def test_kl_in_the_reward_by_hand(models) -> None:
    """Outcome scores are rewards less coef · Σ k1; what the controller is told is the mean per
    sampled token.
    """
    groups = groups_of(STEP)
    coef = 0.1
    algorithm = AlgorithmConfig(use_kl_in_reward=True, norm_adv_by_std_in_grpo=False)
    made = made_of(models, groups, algorithm, coef, reference=models[1])
    found, logp = present(models[0], groups)
    _, ref = present(models[1], groups)
    penalties = [
        (p - r)[t.mask].sum(dtype=np.float64) for t, p, r in zip(found, logp, ref, strict=True)
    ]
    scores = np.array([0.0, 1.0, 2.0]) - coef * np.array(penalties)
    assert [row.advantage[row.mask][0] for row in made.rows] == pytest.approx(
        (scores - scores.mean()).tolist(), rel=1e-6
    )
    assert (
        made.kl == pytest.approx(sum(penalties) / sum(t.sampled for t in found), rel=1e-6)
        and abs(made.kl) > 0.01
    )
    assert made.metrics["actor/reward_kl_penalty_coeff"] == coef
    assert made.metrics["critic/rewards/min"] == pytest.approx(scores.min(), rel=1e-6)
