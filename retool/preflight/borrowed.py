"""Requests that can't be met for a model that runs as transformers' own module."""

from __future__ import annotations

from collections.abc import Iterator

from retool.config import Fault
from retool.config.options import RunOptions
from retool.model.borrowed.config import BorrowedConfig
from retool.model.config import ModelConfig


def check_borrowed(options: RunOptions, model: ModelConfig | None) -> Iterator[Fault]:
    """Faults for settings that our own decoder knows and transformers' module doesn't."""
    if not isinstance(model, BorrowedConfig):
        return
    key = options.model_key
    checkpointing = options.model.enable_gradient_checkpointing
    # What is asked for; whether it is; what to ask for instead
    asked = (
        (
            f"{key}enable_gradient_checkpointing=selective",
            checkpointing == "selective",
            "true, false or auto",
        ),
        (f"{key}activation_offload=true", options.model.activation_offload is True, "false"),
        (f"{key}fp32_residual=true", options.model.fp32_residual is True, "false"),
        (f"{key}use_compile=true", options.model.use_compile is True, "auto"),
    )
    for where, wanted, instead in asked:
        if wanted:
            problem = (
                f"model_type {model.family} runs as transformers' module, which can't do that."
            )
            yield Fault(where, problem, f"Use {instead}.")


def check_longest(model: ModelConfig | None, longest: int, key: str) -> Iterator[Fault]:
    """A fault if documents are longer than the module computes rightly."""
    if not isinstance(model, BorrowedConfig) or not 0 < model.longest < longest:
        return
    problem = (
        f"samples have up to {longest:,} tokens, and model_type {model.family} is limited by "
        f"{model.because}."
    )
    yield Fault(
        key,
        problem,
        f"Use {key}={model.longest} with data.truncation=drop, or right.",
    )
