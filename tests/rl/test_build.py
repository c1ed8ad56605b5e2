"""What each key of the configuration becomes in the parts of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retool.config import parse
from retool.data.packing import Budget
from retool.rl.agent.rollout import Overlong, Sampling
from retool.rl.build import (
    experience_options,
    logprob_budget,
    rollout_parts,
    stream,
    training_sampling,
    update_budget,
    validation_sampling,
)
from retool.rl.config import RLConfig
from retool.rl.config.algorithm import KLControlConfig
from retool.rl.objective.batching import Row
from retool.rl.objective.experience import Experience
from retool.rl.reward.protocol import Judged
from retool.rl.state import TrainState
from retool.rl.train import adapt_kl, micro_batches, one_update
from tests.rl.conftest import make_prompt
from tests.rl.test_config import ARR, REQUIRED


def config_of(**values: object) -> RLConfig:
    """`rollout__n=2` is `actor_rollout_ref.rollout.n=2`, and `data__seed=2` is `data.seed=2`."""
    words = []
    for name, value in values.items():
        key = name.replace("__", ".")
        of_policy = key.startswith(("rollout.", "actor.", "ref."))
        words.append(f"{ARR if of_policy else ''}{key}={value}")
    return parse(RLConfig, [*REQUIRED, *words])


def test_training_and_validation_draw_as_they_are_told_and_from_streams_of_their_own() -> None:
    drawn = {"rollout__temperature": 0.7, "rollout__top_p": 0.8, "rollout__top_k": 9}
    checked = {"temperature": 0.3, "top_p": 0.6, "top_k": 5}
    config = config_of(
        trainer__seed=11,
        **drawn,
        **{f"rollout__val_kwargs__{name}": value for name, value in checked.items()},
    )
    assert training_sampling(config) == Sampling(0.7, 0.8, 9, seed=11, split=0)
    assert validation_sampling(config) == Sampling(0.3, 0.6, 5, seed=11, split=1)
    greedy = config_of(rollout__val_kwargs__do_sample=False)
    assert validation_sampling(greedy).temperature == 0


class _Judge:
    seen = ()

    async def score(self, asked: object) -> Judged:
        raise AssertionError(asked)


def test_the_agent_has_the_limits_of_the_run() -> None:
    limits = {
        "max_assistant_turns": 3,
        "max_user_turns": 5,
        "max_tool_response_length": 70,
        "max_parallel_calls": 4,
        "tool_timeout_seconds": 7.5,
    }
    config = config_of(
        data__max_response_length=900,
        rollout__multi_turn__tool_response_truncate_side="left",
        reward_model__overlong_buffer__enable=True,
        reward_model__overlong_buffer__len=80,
        reward_model__overlong_buffer__penalty_factor=0.25,
        **{f"rollout__multi_turn__{name}": value for name, value in limits.items()},
    )
    report = SimpleNamespace(
        config=config,
        renderer=object(),
        calls=None,
        tools=(),
        folder=None,
        environment=None,
        loop=None,
    )
    session: Any = SimpleNamespace(report=report)
    engine: Any = object()
    judge: Any = _Judge()
    parts = rollout_parts(session, engine, judge)
    found = {name: getattr(parts.agent, name) for name in limits}
    assert found == limits
    assert (parts.agent.max_response_length, parts.agent.truncate_side) == (900, "left")
    assert parts.overlong == Overlong(80, 0.25)


def test_micro_batches_are_of_tokens_or_of_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retool.rl.build.quadratic_length", lambda model: 33)
    by_tokens = config_of(actor__ppo_max_token_len_per_gpu=500)
    read_more = config_of(
        actor__ppo_max_token_len_per_gpu=500, ref__log_prob_max_token_len_per_gpu=800
    )
    by_count = config_of(actor__use_dynamic_bsz=False, actor__ppo_micro_batch_size_per_gpu=2)
    reports: list[Any] = [
        SimpleNamespace(config=config, model=object())
        for config in (by_tokens, read_more, by_count)
    ]
    assert [update_budget(report) for report in reports] == [
        Budget(500, None, 33),
        Budget(500, None, 33),
        Budget(None, 2, 33),
    ]
    assert [logprob_budget(report).max_tokens_per_gpu for report in reports[:2]] == [500, 800]


@pytest.mark.parametrize(
    ("groups", "epochs", "wanted"), [(4, 1, True), (3, 1, True), (5, 1, False), (4, 2, False)]
)
def test_old_log_probabilities_are_the_present_ones_in_a_steps_only_update(
    groups: int, epochs: int, wanted: bool
) -> None:
    config = config_of(actor__ppo_mini_batch_size=4, actor__ppo_epochs=epochs)
    assert one_update(config, groups) is wanted


def test_the_order_of_the_questions_is_the_datas_own_or_its_seeds() -> None:
    questions = SimpleNamespace(prompts=[make_prompt(i, truth=str(i)) for i in range(8)])

    def order(**values: object) -> str:
        report: Any = SimpleNamespace(config=config_of(**values), train=questions)
        return "".join(prompt.ground_truth for prompt in stream(report, 0, 8))

    assert order(data__shuffle=False) == "01234567"
    shuffled = order(data__seed=1)
    assert sorted(shuffled) == list("01234567") and shuffled not in (
        "01234567",
        order(data__seed=2),
    )
    assert order(trainer__seed=1) == shuffled


def test_dr_grpos_mean_is_over_the_longest_answer_that_the_run_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retool.rl.build.quadratic_length", lambda model: 33)
    mask = np.array([False, True, True, True])
    zeros = np.zeros(4)
    row = Row(np.arange(4, dtype=np.int32), mask, zeros, zeros, zeros, zeros)
    config = config_of(data__max_response_length=50)
    report = SimpleNamespace(config=config, model=object(), aggregation="seq-mean-token-sum-norm")
    session: Any = SimpleNamespace(report=report, mesh=SimpleNamespace(dp_rank=0, dp=1, sp=1))
    weights = [float(batch.weights.sum()) for batch in micro_batches(session, [row, row])]
    assert sum(weights) == pytest.approx(2 * 3 / (2 * 50))


@pytest.mark.parametrize(("kind", "wanted"), [("fixed", 0.5), ("adaptive", 0.5 * (1 + 0.2 / 10))])
def test_a_fixed_coefficient_of_the_kl_stays(kind: Any, wanted: float) -> None:
    state = TrainState(0.5)
    row: Any = object()
    made = Experience([row], [0], [0], {}, kl=9.0)
    adapt_kl(state, made, KLControlConfig(type=kind, horizon=10, target_kl=0.1))
    assert state.kl_coef == pytest.approx(wanted)
    adapt_kl(state, Experience([row], [0], [0], {}), KLControlConfig(type=kind))
    assert state.kl_coef == pytest.approx(wanted), "there is no KL in the reward"


@pytest.mark.parametrize("credited", [True, False])
def test_turns_have_their_rewards_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, credited: bool
) -> None:
    monkeypatch.setattr("retool.rl.build.quadratic_length", lambda model: 33)
    config = config_of(algorithm__credit_turns=credited, rollout__temperature=0.7)
    reward = SimpleNamespace(turn_weight=0.25)
    report: Any = SimpleNamespace(config=config, estimator=object(), reward=reward, model=object())
    options = experience_options(report, TrainState(0.5, step=3), one_update=True)
    assert options.turn_weight == (0.25 if credited else 0)
    assert (options.step, options.kl_coef, options.temperature) == (3, 0.5, 0.7)
