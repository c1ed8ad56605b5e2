"""`reward_model.model.*`: a sequence-classification model that judges."""

from __future__ import annotations

from dataclasses import dataclass

from retool.config import option


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model on the run's own GPUs: reward_model.name=model."""

    path: str | None = option(
        None,
        "Hugging Face folder or hub id of a model for sequence classification with one label.",
    )
    max_length: int = option(
        4096,
        "Tokens of the longest conversation that the model reads; a longer one gets "
        "reward_model.floor.",
        minimum=16,
    )
    micro_batch_size: int = option(
        8,
        "Conversations that the model reads at once, at most.",
        minimum=1,
    )
