"""SmolLM3: Llama's layer, and every fourth one without rope (NoPE, arXiv 2501.18795). Where windows are
switched on, those have them.

The list of families is in `retool.model.catalogue.families`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from retool.model.config import ModelConfig
from retool.model.families.llama import Block as Block
from retool.model.families.llama import costs as costs
from retool.model.hf.fields import WINDOWS, shown, size, switch
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import FULL, SLIDING, by_kind, where_switched_on

# beside those that every family has
FIELDS = WINDOWS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}
KV_HEADS = 4  # transformers' defaults
THETA = 2_000_000.0
INTERVAL = 4


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`attention_bias` gives biases to q, k, v and o; `mlp_bias` to all three of the MLP."""
    layers = size(c, "num_hidden_layers")
    unrotated = _unrotated(c, layers)
    window = where_switched_on(c, default=None)
    kinds = [SLIDING if window and i in unrotated else FULL for i in range(layers)]
    shape = read_shape(
        {"rope_theta": THETA, "tie_word_embeddings": True, **c},
        FIELDS,
        KV_HEADS,
        windows=by_kind(c, window, kinds),
    )
    biased = switch(c, "attention_bias")
    return replace(
        shape,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=switch(c, "mlp_bias"),
        unrotated=unrotated,
    )


def _unrotated(c: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Numbers of the layers without rope. In the file's list a 0 means: without."""
    given = c.get("no_rope_layers")
    if given is None:
        interval = c.get("no_rope_layer_interval", INTERVAL)
        if type(interval) is not int or interval < 1:
            raise ValueError(
                f"{shown('no_rope_layer_interval', interval)} is no whole number from 1 on. Fetch it again."
            )
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise ValueError(
            f"{shown('no_rope_layers', given)} is no list of {layers} times 0 or 1. Fetch it again."
        )
    return tuple(i for i in range(layers) if not given[i])
