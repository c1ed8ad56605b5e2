"""Mistral, where every layer sees the whole sequence: 7B from version 0.2 on, Nemo, Small 3.

A layer is Llama's. A `sliding_window` is refused by name: transformers has one of 4,096 tokens
where the file doesn't say.

The list of families is in `retool.model.families.read`.
"""

from __future__ import annotations

from typing import Any

from retool.model.config import ModelConfig
from retool.model.families.llama import Block as Block
from retool.model.families.llama import costs as costs
from retool.model.hf_config.fields import refused
from retool.model.hf_config.shape import read_shape

FIELDS = frozenset({"sliding_window"})  # beside those that every family has
KV_HEADS = 8  # transformers' defaults
WINDOW = 4096


def read_config(c: dict[str, Any]) -> ModelConfig:
    window = c.get("sliding_window", WINDOW)
    if window is not None:
        raise ValueError(
            f"{refused('sliding_window', window)} With samples no longer than the window it is the "
            "same as sliding_window=null: say that in the file."
        )
    return read_shape(c, FIELDS, kv_heads=KV_HEADS)
