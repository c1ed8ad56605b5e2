"""`reward_model.model.*`: a sequence-classification model that judges."""

from __future__ import annotations

from dataclasses import dataclass

from retool.config import option


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model on the run's own GPUs: reward_model.name=model."""

    path: str | None = option(
        None,
        "Its Hugging Face folder or hub id: a model for sequence classification with one label.",
    )
    max_length: int = option(
        4096,
        "Tokens of the longest conversation that it reads; a longer one gets the floor.",
        minimum=16,
    )
    micro_batch_size: int = option(
        8,
        "Conversations that it reads at once, at most.",
        minimum=1,
    )
