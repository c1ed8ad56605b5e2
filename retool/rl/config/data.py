"""`data.*`: the questions; and where a function of the user's is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from retool.config import REQUIRED, option, options

ANSWER_FORMAT = "The answer format must be: \\boxed{'The final answer goes here.'}"


@dataclass(frozen=True)
class FunctionConfig:
    """A function of your own."""

    path: str | None = option(None, "Python file.")
    name: str | None = option(None, "Function in that file.")


@dataclass(frozen=True)
class DataConfig:
    """The questions."""

    train_files: tuple[str, ...] = option(REQUIRED, options.FILES)
    val_files: tuple[str, ...] | None = option(None, "The same, for validation; null = none.")
    name: str | None = option(None, options.DATASET_NAME)
    train_split: str | None = option(None, options.TRAIN_SPLIT)
    val_split: str | None = option(None, options.VAL_SPLIT)
    prompt_key: str = option("prompt", "Column with the chat messages (or the question's text).")
    train_max_samples: int = option(-1, "Use the first N training rows; -1 = all.", minimum=-1)
    val_max_samples: int = option(-1, "Use the first N validation rows; -1 = all.", minimum=-1)
    train_batch_size: int = option(512, "Prompts per step over all GPUs.", minimum=1)
    gen_batch_size: int | None = option(
        None,
        "Prompts per round of sampling under filter_groups; null = train_batch_size.",
        minimum=1,
    )
    max_prompt_length: int = option(
        2048, "Longest prompt in tokens, tool schemas included.", minimum=1
    )
    max_response_length: int = option(
        16384, "Longest response in tokens, all turns and tool text together.", minimum=1
    )
    filter_overlong_prompts: bool = option(
        True, "Leave out prompts longer than max_prompt_length, and count them."
    )
    truncation: Literal["error", "left", "right"] = option(
        "error",
        "What happens to longer prompts that aren't filtered: error = refused; left, "
        "right = cut at that side (by tokens).",
    )
    answer_format: str | None = option(
        ANSWER_FORMAT,
        "A line that is added to math questions that don't say how to answer; null = none.",
        spellings={"true": ANSWER_FORMAT},
    )
    shuffle: bool = option(
        True, "Shuffle each epoch; the order is a function of (data.seed, epoch) alone."
    )
    seed: int = option("${trainer.seed}", "Seed of the data order.", minimum=0)
    chat_template: str | None = option(
        None, "Replaces the model's chat template: a file, or hermes (ours: ChatML with tools)."
    )
    template_date: str | None = option(None, options.TEMPLATE_DATE)
    apply_chat_template_kwargs: dict[str, Any] = option(
        {}, "Passed on to the chat template, e.g. {enable_thinking: false}."
    )
    custom_cls: FunctionConfig = field(default_factory=FunctionConfig)
