"""Ministral 8B: Mistral's layer, some of them with a window (in the file one in four sees everything).

The list of families is in `retool.model.catalogue.families`.
"""

from __future__ import annotations

from typing import Any

from retool.model.config import ModelConfig
from retool.model.families.llama import Block as Block
from retool.model.families.llama import costs as costs
from retool.model.families.mistral import FIELDS, KV_HEADS, WINDOW
from retool.model.hf.fields import size
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import FULL, SLIDING, by_kind, window_size


def read_config(c: dict[str, Any]) -> ModelConfig:
    """A file without `layer_types` means the window in every layer, if it has one."""
    window = window_size(c, WINDOW)
    kinds = [SLIDING if window else FULL] * size(c, "num_hidden_layers")
    return read_shape(c, FIELDS, kv_heads=KV_HEADS, windows=by_kind(c, window, kinds))
