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
        "The model's name there.",
    )
    key_variable: str | None = option(
        None,
        "The environment variable that holds the key; null = it needs none.",
    )
    prompt: str | None = option(
        None,
        "Text, or a file, with {question}, {answer}, {ground_truth} or {conversation}.",
    )
    pattern: str = option(
        r"(?i)score\W*?(-?\d+(?:\.\d+)?)",
        "Regular expression whose last match's first group is the score.",
    )
    lowest: float = option(
        0.0,
        "The worst score that it may give; becomes 0.",
    )
    highest: float = option(
        10.0,
        "The best one; becomes 1. A number outside is no score.",
    )
    temperature: float = option(
        0.0,
        "Of its sampling.",
        minimum=0,
    )
    max_tokens: int = option(
        1024,
        "Of its reply.",
        minimum=1,
    )
    max_concurrent: int = option(
        16,
        "Requests at once, of each process that samples.",
        minimum=1,
    )
    timeout_seconds: float = option(
        60.0,
        "Of one request.",
        above=0,
    )
    retries: int = option(
        5,
        "New tries where it is busy, away, late or cut short; then the answer is lost.",
        minimum=0,
    )
    cache: str | None = option(
        None,
        "Folder that keeps its replies, for later runs too; null = they aren't kept.",
    )
    max_calls: int | None = option(
        None,
        "Requests of a run, from its start or resume on; null = no limit.",
        minimum=1,
    )
    max_total_tokens: int | None = option(
        None,
        "Tokens of a run, as the server counts them; null = no limit.",
        minimum=1,
    )
    when_spent: Literal["end", "mask"] = option(
        "end",
        "Then the run ends, or answers that aren't judged aren't trained.",
    )
