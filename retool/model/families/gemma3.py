"""Gemma 3, the text models: Gemma 2's layer with norms of q's and k's heads in place of the caps;
layers with a window have a rope of their own.

transformers calls the family `gemma3_text`. Caps of logits and of scores are refused by name. The
engine's kernel for rope knows plain norms only, so it isn't used here.

The list of families is in `retool.model.catalogue.families`.

Legend: t tokens of this rank · N query heads · K kv heads · H head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from retool.model.block import Execution, new_parameter
from retool.model.config import ModelConfig
from retool.model.families import gemma2
from retool.model.hf.fields import number, size, without_agreed
from retool.model.hf.names import Stored, normed_attention
from retool.model.hf.shape import read_shape
from retool.model.hf.two_ropes import split_ropes
from retool.model.hf.windows import FULL, SLIDING, by_kind, window_size
from retool.model.layer_costs.cost import Cost, LayerCosts
from retool.model.rope import rotate

# beside those that every family has
FIELDS = frozenset(
    {
        "sliding_window",
        "sliding_window_pattern",
        "rope_local_base_freq",
        "attention_bias",
        "query_pre_attn_scalar",
        "hidden_activation",
    }
)
# transformers' defaults
HEAD_DIM = 256
KV_HEADS = 4
WINDOW = 4096
THETA = 1_000_000.0
WINDOW_THETA = 10_000.0
PATTERN = {"sliding_window_pattern": 6}


def read_config(c: dict[str, Any]) -> ModelConfig:
    """Gemma 2's fields but for the caps. Without `layer_types` each `sliding_window_pattern`-th layer
    sees everything.
    """
    layers = size(c, "num_hidden_layers")
    every = size({**PATTERN, **c}, "sliding_window_pattern")
    kinds = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    windows = by_kind(c, window_size(c, WINDOW), kinds)
    window_theta = number(c, "rope_local_base_freq", WINDOW_THETA)
    tied = {"tie_word_embeddings": True, **without_agreed(c, {"hidden_act": gemma2.ACTIVATION})}
    whole, window_rope = split_ropes(tied, THETA, window_theta)
    shape = read_shape(whole, FIELDS, KV_HEADS, HEAD_DIM, windows=windows)
    return replace(gemma2.as_gemma(c, shape), qk_norm=True, window_rope=window_rope)


def costs(config: ModelConfig, sp: int) -> LayerCosts:
    c = config
    normed = (
        Cost("q k v before the norms of heads", c.query_width + 2 * c.key_width),
        Cost("the norms' scales", c.heads + c.kv_heads, "fp32"),
    )
    wide = (
        Cost("queries and keys in the dtype of sums", c.query_width + c.key_width, "sums"),
        Cost("queries scaled likewise, in place of them in their own", c.query_width),
    )
    return gemma2.costs(config, sp, normed, wide)


class Block(gemma2.Block):
    """norm → q k v → norms of q and k → rope → attention → o → norm, norm → gated MLP → norm."""

    rope_is_fusible = False

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__(config, index, execution)
        self.q_norm = new_parameter(config.head_dim)
        self.k_norm = new_parameter(config.head_dim)

    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_k_v(heads_tJH)
        q = self.normed(q, self.q_norm)
        k = self.normed(k, self.k_norm)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attention_stored(self) -> list[Stored]:
        return normed_attention(self.config)
