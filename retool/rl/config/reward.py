"""`reward_model.*`: how answers are judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from retool.config import option
from retool.rl.config.judge import LLMJudgeConfig
from retool.rl.config.reward_model import RewardModelConfig


@dataclass(frozen=True)
class OverlongConfig:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13)."""

    enable: bool = option(False, "Add this penalty to the reward.")
    len: int = option(
        4096, "The penalty grows over so many tokens before max_response_length.", minimum=1
    )
    penalty_factor: float = option(1.0, "The penalty at max_response_length.", minimum=0)


@dataclass(frozen=True)
class RewardConfig:
    """How answers are judged."""

    name: str | None = option(
        None,
        "retool, boxed, math, judge, model, or file.py/function; null = custom_reward_function, else "
        "by data_source.",
    )
    functions: tuple[str, ...] = option(
        (),
        "Several rewards, each given as in reward_model.name; the score is their weighted sum.",
    )
    weights: tuple[float, ...] = option(
        (),
        "Weights of reward_model.functions, in their order; without any, each weighs 1.",
    )
    num_workers: int = option(
        2,
        "Processes per rank that compute rewards. They have no network and no secrets "
        "in their environment.",
        minimum=1,
    )
    network: bool = option(
        False, "Let these processes use the network, for a judge behind an address."
    )
    environment: tuple[str, ...] = option(
        (), "Names of the environment variables that these processes get, such as [OPENAI_API_KEY]."
    )
    concurrent: bool = option(
        False,
        (
            "Await an async reward function in the run's own process, for many "
            "answers at once. It has the run's network and environment."
        ),
    )
    max_concurrent: int = option(
        64, "With concurrent: answers that are judged at once, at most.", minimum=1
    )
    timeout_seconds: float = option(
        2.0, "An answer whose reward takes longer gets reward_model.floor.", above=0
    )
    memory_mb: int = option(2048, "Memory of a worker.", minimum=64)
    floor: float = option(
        -1.0,
        "Score of an answer on which the reward function fails: by an exception, a timeout or NaN.",
    )
    max_failed_share: float = option(
        0.5,
        (
            "The run ends if the reward function fails on a larger share of the "
            "answers of a step or a validation, or on all of them."
        ),
        above=0,
        maximum=1,
    )
    trial_answer: str | None = option(
        "auto",
        (
            "Answer on which the reward function is tried before the run; auto = the "
            "row's truth in a \\boxed{}; null = it isn't tried."
        ),
    )
    judge: LLMJudgeConfig = field(default_factory=LLMJudgeConfig)
    enable: bool = option(False, "verl's way to write reward_model.name=model.")
    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    overlong_buffer: OverlongConfig = field(default_factory=OverlongConfig)
