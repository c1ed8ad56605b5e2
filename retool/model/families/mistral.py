"""Mistral: 7B, Nemo, Small 3. A layer is Llama's; with a `sliding_window` all layers have it, and where
the file doesn't say it is 4,096 tokens.

The list of families is in `retool.model.catalogue.families`.
"""

from __future__ import annotations

from typing import Any

from retool.model.config import ModelConfig
from retool.model.families.llama import Block as Block
from retool.model.families.llama import costs as costs
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import in_every_layer

FIELDS = frozenset({"sliding_window"})  # beside those that every family has
KV_HEADS = 8  # transformers' defaults
WINDOW = 4096


def read_config(c: dict[str, Any]) -> ModelConfig:
    return read_shape(c, FIELDS, kv_heads=KV_HEADS, windows=in_every_layer(c, WINDOW))
