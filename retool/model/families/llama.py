"""Llama 2 and 3, and what has their shape: TinyLlama, SmolLM2, R1-Distill-Llama.

There are biases only where `config.json` asks for them. Llama 3.1's rope scaling is in
`retool.model.rope`.

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
from retool.model.hf.fields import switch
from retool.model.hf.names import Stored, query_key_value
from retool.model.hf.shape import read_shape
from retool.model.layer_costs.cost import LayerCosts
from retool.model.layer_costs.dense import gated_block_costs
from retool.model.rope import rotate

FIELDS = frozenset({"attention_bias", "mlp_bias"})  # beside those that every family has


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`attention_bias` gives biases to q, k, v and o; `mlp_bias` to all three of the MLP."""
    shape = read_shape(c, FIELDS)
    biased = switch(c, "attention_bias")
    return replace(shape, qkv_bias=biased, o_bias=biased, mlp_bias=switch(c, "mlp_bias"))


def costs(config: ModelConfig, sp: int) -> LayerCosts:
    return gated_block_costs(config, sp)


class Block(block.Block):
    """norm → q k v → rope → attention → o → norm → SwiGLU."""

    rope_is_fusible = True

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__(config, index, execution)
        c = config
        qkv_rows = c.query_width + 2 * c.key_width
        self.norm_1 = new_parameter(c.hidden)
        self.qkv = new_parameter(qkv_rows, c.hidden)
        self.qkv_bias = new_parameter(qkv_rows) if c.qkv_bias else None
        self.o = new_parameter(c.hidden, c.query_width)
        self.o_bias = new_parameter(c.hidden) if c.o_bias else None
        self.norm_2 = new_parameter(c.hidden)
        self.gate_up = new_parameter(2 * c.ffn, c.hidden)
        self.gate_up_bias = new_parameter(2 * c.ffn) if c.mlp_bias else None
        self.down = new_parameter(c.hidden, c.ffn)
        self.down_bias = new_parameter(c.hidden) if c.mlp_bias else None

    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        normed_tD = rms_norm(x_tD, self.norm_1, self.config.norm_eps)
        return self.by_head(F.linear(normed_tD, self.qkv, self.qkv_bias))

    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_k_v(heads_tJH)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        x_tD = x_tD + F.linear(a_tE, self.o, self.o_bias)
        normed_tD = rms_norm(x_tD, self.norm_2, self.config.norm_eps)
        return x_tD + self.gated_mlp(normed_tD)

    def gated_mlp(self, x_tD: torch.Tensor) -> torch.Tensor:
        biases = self.gate_up_bias, self.down_bias
        return swiglu(x_tD, self.gate_up, self.down, *biases, wanted=self.result_wanted)

    def stored(self) -> list[Stored]:
        c = self.config
        return [
            *query_key_value(self.config),
            Stored("self_attn.o_proj.weight", "o"),
            Stored("self_attn.o_proj.bias", "o_bias"),
            Stored("mlp.gate_proj.weight", "gate_up", c.ffn),
            Stored("mlp.gate_proj.bias", "gate_up_bias", c.ffn),
            Stored("mlp.up_proj.weight", "gate_up", c.ffn),
            Stored("mlp.up_proj.bias", "gate_up_bias", c.ffn),
            Stored("mlp.down_proj.weight", "down"),
            Stored("mlp.down_proj.bias", "down_bias"),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
        ]
