"""Qwen3, the dense models.

Each head of q and k has a norm before rope. There are biases only where `config.json` asks for
them, in attention.

The list of families is in `retool.model.catalogue.families`.

Legend: t tokens of this rank · N query heads · K kv heads · H head dim · D model · E = N·H.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from retool.model import block
from retool.model.block import Execution, new_parameter, rms_norm, swiglu
from retool.model.config import ModelConfig
from retool.model.hf.fields import WINDOWS, switch, without_agreed
from retool.model.hf.names import Stored, gate_up_down, normed_attention
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import from_a_layer_on
from retool.model.layer_costs.cost import Cost, LayerCosts
from retool.model.layer_costs.dense import gated_block_costs, wide_heads
from retool.model.rope import rotate

FIELDS = WINDOWS | {"attention_bias"}  # beside those that every family has
KV_HEADS = 32  # transformers' defaults
HEAD_DIM = 128
AGREED = {"use_qk_norm": True}


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`attention_bias` gives biases to q, k, v and o."""
    windows = from_a_layer_on(c)
    rest = without_agreed(c, AGREED)
    shape = read_shape(rest, FIELDS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, windows=windows)
    biased = switch(c, "attention_bias")
    return replace(shape, qkv_bias=biased, o_bias=biased, qk_norm=True)


def costs(config: ModelConfig, sp: int) -> LayerCosts:
    return gated_block_costs(config, sp, norms_of_heads(config), wide_heads(config))


def norms_of_heads(c: ModelConfig) -> tuple[Cost, ...]:
    """What is kept besides, for the norms of q's and k's heads."""
    return (
        Cost("q k v before the norms of heads", c.query_width + 2 * c.key_width),
        Cost("the norms' scales", c.heads + c.kv_heads, "fp32"),
    )


class Block(block.Block):
    """norm → q k v → norms of q and k → rope → attention → o → norm → SwiGLU."""

    rope_is_fusible = True

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__(config, index, execution)
        c = config
        qkv_rows = c.query_width + 2 * c.key_width
        self.norm_1 = new_parameter(c.hidden)
        self.qkv = new_parameter(qkv_rows, c.hidden)
        self.qkv_bias = new_parameter(qkv_rows) if c.qkv_bias else None
        self.q_norm = new_parameter(c.head_dim)
        self.k_norm = new_parameter(c.head_dim)
        self.o = new_parameter(c.hidden, c.query_width)
        self.o_bias = new_parameter(c.hidden) if c.o_bias else None
        self.norm_2 = new_parameter(c.hidden)
        self.gate_up = new_parameter(2 * c.ffn, c.hidden)
        self.down = new_parameter(c.hidden, c.ffn)

    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        normed_tD = rms_norm(x_tD, self.norm_1, self.config.norm_eps)
        return self.by_head(F.linear(normed_tD, self.qkv, self.qkv_bias))

    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_k_v(heads_tJH)
        q = rms_norm(q, self.q_norm, self.config.norm_eps)
        k = rms_norm(k, self.k_norm, self.config.norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        x_tD = x_tD + F.linear(a_tE, self.o, self.o_bias)
        normed_tD = rms_norm(x_tD, self.norm_2, self.config.norm_eps)
        return x_tD + swiglu(normed_tD, self.gate_up, self.down, wanted=self.result_wanted)

    def head_norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm, self.k_norm

    def stored(self) -> list[Stored]:
        return [
            *normed_attention(self.config),
            *gate_up_down(self.config),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
        ]
