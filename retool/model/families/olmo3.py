"""OLMo 3: OLMo 2's layer; three of four have a window, and YaRN is for the others alone.

The list of families is in `retool.model.catalogue.families`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from retool.model.config import ModelConfig
from retool.model.families.olmo2 import FIELDS as OLMO2_FIELDS
from retool.model.families.olmo2 import NORM_EPS
from retool.model.families.olmo2 import Block as Block
from retool.model.families.olmo2 import costs as costs
from retool.model.hf.fields import size, switch
from retool.model.hf.shape import read_shape
from retool.model.hf.two_ropes import split_ropes
from retool.model.hf.windows import FULL, SLIDING, by_kind, window_size

FIELDS = OLMO2_FIELDS | {"sliding_window"}  # beside those that every family has
# transformers' defaults
THETA = 500_000.0
WINDOW = 4096


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`attention_bias` gives biases to q, k, v and o. Layers with a window have a theta of their own,
    and the file's `rope_theta` isn't it.
    """
    layers = size(c, "num_hidden_layers")
    kinds = [FULL if i % 4 == 3 else SLIDING for i in range(layers)]
    windows = by_kind(c, window_size(c, WINDOW), kinds)
    whole, window_rope = split_ropes({"rms_norm_eps": NORM_EPS, **c}, THETA, THETA)
    shape = read_shape(whole, FIELDS, windows=windows)
    biased = switch(c, "attention_bias")
    return replace(shape, qkv_bias=biased, o_bias=biased, window_rope=window_rope)
