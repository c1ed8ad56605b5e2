"""Gemma 3, the text models: norms before and after attention and the MLP, whose weights are stored
less 1; norms of q's and k's heads; layers with a window that have a rope of their own.

transformers calls the family `gemma3_text`. Caps of logits and of scores, as Gemma 2 has them, are
refused by name. The engine's kernel for rope knows plain norms only, so it isn't used here.

The list of families is in `retool.model.families.read`.

Legend: t tokens of this rank · N query heads · K kv heads · H head dim · D model · E = N·H · F ffn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from retool.model import block
from retool.model.block import Execution, new_parameter, rms_norm
from retool.model.config import ModelConfig
from retool.model.families.hf_names import Stored, gate_up_down, normed_attention
from retool.model.families.layer_costs import Cost, LayerCosts, gated_block_costs
from retool.model.hf_config.fields import number, refused, size, switch
from retool.model.hf_config.shape import read_shape
from retool.model.hf_config.two_ropes import split_ropes
from retool.model.hf_config.windows import FULL, SLIDING, by_kind, window_size
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
ACTIVATION = "gelu_pytorch_tanh"
# transformers' defaults
HEAD_DIM = 256
KV_HEADS = 4
WINDOW = 4096
THETA = 1_000_000.0
WINDOW_THETA = 10_000.0
PATTERN = {"sliding_window_pattern": 6}


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`query_pre_attn_scalar` stands where others have H in 1/√H; `attention_bias` gives biases to q,
    k, v and o. Without `layer_types` each `sliding_window_pattern`-th layer sees everything.
    """
    if c.get("hidden_activation", ACTIVATION) != ACTIVATION:
        raise ValueError(refused("hidden_activation", c["hidden_activation"]))
    layers = size(c, "num_hidden_layers")
    every = size({**PATTERN, **c}, "sliding_window_pattern")
    kinds = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    windows = by_kind(c, window_size(c, WINDOW), kinds)
    window_theta = number(c, "rope_local_base_freq", WINDOW_THETA)
    whole, window_rope = split_ropes({"tie_word_embeddings": True, **c}, THETA, window_theta)
    shape = read_shape(whole, FIELDS, KV_HEADS, HEAD_DIM, windows=windows)
    biased = switch(c, "attention_bias")
    return replace(
        shape,
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=True,
        norms_less_one=True,
        embedding_scale=math.sqrt(shape.hidden),
        rounded_embedding_scale=True,
        score_scale=math.sqrt(shape.head_dim / number(c, "query_pre_attn_scalar", 256.0)),
        window_rope=window_rope,
    )


def costs(config: ModelConfig, sp: int) -> LayerCosts:
    c = config
    normed = (
        Cost("q k v before the norms of heads", c.query_width + 2 * c.key_width),
        Cost("the norms' scales", c.heads + c.kv_heads, "fp32"),
    )
    plain = gated_block_costs(config, sp, more=normed)
    more = (
        Cost("what attention and the MLP add, before its norm", 2 * c.hidden),
        Cost("those norms' scales", 2, "fp32"),
    )
    return replace(plain, kept={**plain.kept, "none": (*plain.kept["none"], *more)})


class Block(block.Block):
    """norm → q k v → norms of q and k → rope → attention → o → norm, norm → gated MLP → norm."""

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__(config, index, execution)
        c = config
        qkv_rows = c.query_width + 2 * c.key_width
        self.qkv = new_parameter(qkv_rows, c.hidden)
        self.qkv_bias = new_parameter(qkv_rows) if c.qkv_bias else None
        self.o = new_parameter(c.hidden, c.query_width)
        self.o_bias = new_parameter(c.hidden) if c.o_bias else None
        self.q_norm = new_parameter(c.head_dim)
        self.k_norm = new_parameter(c.head_dim)
        self.gate_up = new_parameter(2 * c.ffn, c.hidden)
        self.down = new_parameter(c.hidden, c.ffn)
        self.norm_1 = new_parameter(c.hidden)
        self.norm_2 = new_parameter(c.hidden)
        self.norm_3 = new_parameter(c.hidden)
        self.norm_4 = new_parameter(c.hidden)

    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        return self.by_head(F.linear(self._normed(x_tD, self.norm_1), self.qkv, self.qkv_bias))

    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_k_v(heads_tJH)
        q = self._normed(q, self.q_norm)
        k = self._normed(k, self.k_norm)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        x_tD = x_tD + self._normed(F.linear(a_tE, self.o, self.o_bias), self.norm_2)
        gate, up = F.linear(self._normed(x_tD, self.norm_3), self.gate_up).chunk(2, -1)
        added = F.linear(F.gelu(gate, approximate="tanh") * up, self.down)
        return x_tD + self._normed(added, self.norm_4)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.config.norm_eps, less_one=True)

    def stored(self) -> list[Stored]:
        return [
            *normed_attention(self.config),
            *gate_up_down(self.config),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
            Stored("pre_feedforward_layernorm.weight", "norm_3"),
            Stored("post_feedforward_layernorm.weight", "norm_4"),
        ]
