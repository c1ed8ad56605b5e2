"""`reward_model.*`: how answers are judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from retool.config import option
from retool.rl.config.judge import LLMJudgeConfig
from retool.rl.config.reward_model import RewardModelConfig


@dataclass(frozen=True)
class OverlongConfig:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13)."""

    enable: bool = option(False, "Add it to the reward.")
    len: int = option(
        4096, "The last tokens before max_response_length over which it grows.", minimum=1
    )
    penalty_factor: float = option(1.0, "What it is at max_response_length.", minimum=0)


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
        "Several rewards, each as name says; the score is their weighted sum.",
    )
    weights: tuple[float, ...] = option(
        (),
        "Of these, in their order; 1 each where none are given.",
    )
    num_workers: int = option(
        2, "Processes that judge, per rank; no secrets in their environment, no network.", minimum=1
    )
    network: bool = option(False, "Let them use the network: for a judge behind an address.")
    environment: tuple[str, ...] = option(
        (), "Names of environment variables that they get, such as [OPENAI_API_KEY]; no others."
    )
    concurrent: bool = option(
        False,
        (
            "Await an async function in the run's own process, many answers at once; it has the "
            "run's network and environment."
        ),
    )
    max_concurrent: int = option(64, "That many at once.", minimum=1)
    timeout_seconds: float = option(2.0, "An answer that takes longer gets the floor.", above=0)
    memory_mb: int = option(2048, "Memory of a worker.", minimum=64)
    floor: float = option(-1.0, "Score where the reward function fails: exception, timeout, NaN.")
    max_failed_share: float = option(
        0.5,
        (
            "The run ends where the reward fails on a larger share of a step's answers (or of a "
            "validation's), or on all."
        ),
        above=0,
        maximum=1,
    )
    trial_answer: str | None = option(
        "auto",
        (
            "Answer on which the reward is tried before the run; auto = the row's truth in a "
            "\\boxed{}, null = it isn't tried."
        ),
    )
    judge: LLMJudgeConfig = field(default_factory=LLMJudgeConfig)
    enable: bool = option(False, "The same as name=model, in verl's words.")
    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    overlong_buffer: OverlongConfig = field(default_factory=OverlongConfig)
