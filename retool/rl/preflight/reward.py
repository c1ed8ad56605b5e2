"""Which reward the configuration names, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator

from retool.config import Fault
from retool.rl.config import RLConfig
from retool.rl.objective.advantages import ESTIMATORS, Estimator
from retool.rl.reward.llm_judge.judge import LLMJudge
from retool.rl.reward.model_judge import KEY, open_tokenizer, reward_model_folder
from retool.rl.reward.source import OF_MODEL, OF_TURNS, RewardSource, find_reward, find_several

ESTIMATOR_KEY = "algorithm.adv_estimator"


def wanted_reward(config: RLConfig, in_world: bool) -> RewardSource:
    """The reward that the configuration names; if it names none, `in_world`, the environment's own.

    ValueError where there is none of that name.
    """
    settings = config.reward_model
    custom = config.custom_reward_function
    if settings.functions:
        return find_several(settings.functions, settings.weights)
    name = OF_MODEL if settings.enable and settings.name is None else settings.name
    if name is None and custom.path is None and in_world:
        name = OF_TURNS
    return find_reward(name, custom.path, custom.name)


def reward_key(config: RLConfig) -> str:
    """The key that names the reward."""
    if config.reward_model.functions:
        return "reward_model.functions"
    return "custom_reward_function" if config.custom_reward_function.path else "reward_model.name"


def several_faults(config: RLConfig) -> Iterator[Fault]:
    """Faults of several rewards beside a single one, and of weights without functions."""
    settings = config.reward_model
    where = "reward_model.functions"
    if settings.weights and not settings.functions:
        problem = "has nothing to weigh."
        yield Fault("reward_model.weights", problem, f"Give {where}, or leave it out.")
    if settings.functions and settings.name is not None:
        problem = "and reward_model.name are both given."
        yield Fault(where, problem, "Put all of them into functions.")
    if settings.functions and config.custom_reward_function.path is not None:
        problem = "and custom_reward_function.path are both given."
        yield Fault(where, problem, "Put it into functions as file.py/function.")


def credit_faults(
    config: RLConfig,
    estimator: Estimator | None,
    reward: RewardSource | None,
) -> Iterator[Fault]:
    """Faults of crediting turns where the estimator or the reward doesn't use their rewards."""
    if not config.algorithm.credit_turns:
        return
    where = "algorithm.credit_turns=true"
    if estimator is not None and not estimator.reads_token_rewards:
        able = [name for name, known in ESTIMATORS.items() if known.reads_token_rewards]
        problem = (
            f"{ESTIMATOR_KEY}={config.algorithm.adv_estimator} judges an answer by the sum of its "
            "rewards: which turn they belong to has no effect."
        )
        way_out = f"Use {', '.join(able)} or an estimator of your own, or leave it out."
        yield Fault(where, problem, way_out)
    if reward is not None and not reward.turn_weight:
        problem = f"the reward {reward.name} doesn't count what turns are given."
        way_out = f"Use reward_model.name={OF_TURNS}, or add {OF_TURNS} to reward_model.functions."
        yield Fault(where, problem, way_out)


def judge_faults(
    config: RLConfig,
    reward: RewardSource | None,
) -> Iterator[Fault]:
    """Faults of a judge behind an address that can't be asked. If it is tried, the trial reports
    them.
    """
    settings = config.reward_model
    asked = reward is not None and reward.asks_a_judge
    if not asked or settings.trial_answer is not None:
        return
    try:
        LLMJudge(settings.judge, settings.floor).close()
    except ValueError as error:
        yield Fault("reward_model.judge", str(error))


def model_faults(
    config: RLConfig,
    reward: RewardSource | None,
) -> Iterator[Fault]:
    """Faults of a reward model that isn't one. It isn't tried before the run: its weights are
    large.
    """
    settings = config.reward_model
    if reward is None or not reward.asks_a_model:
        if settings.enable:
            problem = "reward_model.enable=true, and another reward is named."
            yield Fault("reward_model.enable", problem, "Put `model` into reward_model.functions.")
        return
    try:
        open_tokenizer(reward_model_folder(settings.model))
    except (ValueError, OSError) as error:
        yield Fault(KEY, str(error))
