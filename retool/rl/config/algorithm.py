"""`algorithm.*`: how rewards become advantages, and which samples are worth training on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retool.config import option

KL = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]
KL_SPELLINGS = {
    "kl": "k1",
    "mse": "k2",
    "low_var_kl": "k3",
    "kl+": "k1+",
    "mse+": "k2+",
    "low_var_kl+": "k3+",
}


@dataclass(frozen=True)
class KLControlConfig:
    """The coefficient of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"] = option(
        "fixed", "adaptive moves the coefficient towards target_kl (arXiv 1909.08593)."
    )
    kl_coef: float = option(
        0.001, "The coefficient; with type=adaptive, its first value.", minimum=0
    )
    horizon: int = option(
        10_000,
        "Trajectories over which the adaptive controller changes the coefficient.",
        minimum=1,
    )
    target_kl: float = option(0.1, "KL per token that the adaptive controller aims at.", above=0)


@dataclass(frozen=True)
class FilterGroupsConfig:
    """DAPO's dynamic sampling: groups whose samples all score the same teach nothing."""

    enable: bool = option(
        False, "Sample until the batch is full of groups whose metric differs among their samples."
    )
    metric: str = option(
        "acc",
        "What must differ: acc, score, reward, or another number that the reward function returns.",
    )
    max_num_gen_batches: int = option(
        0,
        "After so many rounds of sampling, train on the groups found so far; 0 = no limit.",
        minimum=0,
    )


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """Importance weights for the difference between the sampler's distribution and the trainer's."""

    rollout_is: Literal["token", "sequence"] | None = option(
        None, "Weigh each token, or each sequence, by exp(old - logp_behaviour); null = no weights."
    )
    rollout_is_threshold: float = option(2.0, "Larger weights are cut to this.", above=0)
    bypass_mode: bool = option(
        False,
        "Use the sampler's log-probabilities as the old policy's, which saves a forward pass.",
    )


@dataclass(frozen=True)
class AlgorithmConfig:
    """How rewards become advantages."""

    adv_estimator: str = option(
        "grpo",
        "grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, or file.py/function.",
    )
    norm_adv_by_std_in_grpo: bool = option(
        True, "Divide advantages by the group's standard deviation; false = Dr. GRPO."
    )
    gamma: float = option(1.0, "Discount per token (reinforce_plus_plus).", minimum=0, maximum=1)
    use_kl_in_reward: bool = option(
        False, "Subtract the KL to the reference policy from the reward, token by token."
    )
    kl_penalty: KL = option("k1", "Estimator of the KL in the reward.", spellings=KL_SPELLINGS)
    mask_truncated: bool = option(
        False,
        "Don't train on answers that ran out of tokens; they still count in their group's mean.",
    )
    credit_turns: bool = option(
        False,
        "Give a turn's reward from tools and the environment to the last token of "
        "that turn, not of the answer.",
    )
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
