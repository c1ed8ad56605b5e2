"""`reward_model.judge.*`: a language model that judges, behind an address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retool.config import option


@dataclass(frozen=True)
class LLMJudgeConfig:
    """A judge behind an OpenAI-compatible address: reward_model.name=judge."""

    base_url: str | None = option(
        None,
        "Its address, up to /chat/completions: http://localhost:8000/v1.",
    )
    model: str | None = option(
        None,
        "The model's name at that address.",
    )
    key_variable: str | None = option(
        None,
        "The environment variable that holds the key; null = no key is needed.",
    )
    prompt: str | None = option(
        None,
        "What the judge is asked: a text, or a file, with {question}, {answer}, "
        "{ground_truth} or {conversation}.",
    )
    pattern: str = option(
        r"(?i)score\W*?(-?\d+(?:\.\d+)?)",
        "Regular expression that finds the score: the first group of its last match.",
    )
    lowest: float = option(
        0.0,
        "The worst score that the judge may give; it becomes 0.",
    )
    highest: float = option(
        10.0,
        "The best score; it becomes 1. A number outside of these two is no score.",
    )
    temperature: float = option(
        0.0,
        "Temperature at which the judge samples.",
        minimum=0,
    )
    max_tokens: int = option(
        1024,
        "Tokens of the judge's reply, at most.",
        minimum=1,
    )
    max_concurrent: int = option(
        16,
        "Requests at once of each process that samples, at most.",
        minimum=1,
    )
    timeout_seconds: float = option(
        60.0,
        "Seconds that one request may take.",
        above=0,
    )
    retries: int = option(
        5,
        "How often a request is repeated if the judge is busy, away, late or cut "
        "short. Then the answer is lost.",
        minimum=0,
    )
    cache: str | None = option(
        None,
        "Folder that keeps the judge's replies, for later runs too; null = they aren't kept.",
    )
    max_calls: int | None = option(
        None,
        "Requests of a run since its start or resume, at most; null = no limit.",
        minimum=1,
    )
    max_total_tokens: int | None = option(
        None,
        "Tokens of a run as the server counts them, at most; null = no limit.",
        minimum=1,
    )
    when_spent: Literal["end", "mask"] = option(
        "end",
        "What happens when a limit is reached: end = the run ends; mask = answers "
        "that aren't judged aren't trained.",
    )
