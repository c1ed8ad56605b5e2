"""OLMo 2: norms after attention and after the MLP instead of before, and norms of all queries and
all keys of a token (arXiv 2501.00656).

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
from retool.model.hf.names import Stored, gate_up_down, normed_attention
from retool.model.hf.shape import read_shape
from retool.model.layer_costs.cost import Cost, LayerCosts, Uncompiled
from retool.model.layer_costs.dense import gated_block_costs, wide_heads
from retool.model.rope import rotate

FIELDS = frozenset({"attention_bias"})  # beside those that every family has
NORM_EPS = 1e-5  # transformers' default


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`attention_bias` gives biases to q, k, v and o."""
    shape = read_shape({"rms_norm_eps": NORM_EPS, **c}, FIELDS)
    biased = switch(c, "attention_bias")
    return replace(shape, qkv_bias=biased, o_bias=biased)


def costs(config: ModelConfig, sp: int) -> LayerCosts:
    plain = gated_block_costs(config, sp, more=norms_of_all_heads(config), norms_after=True)
    # No norm is before attention, but for those of heads
    norms = Cost("results of attention and the MLP in the dtype of sums", 2 * config.hidden, "sums")
    gated = Cost("silu of gate, and its product with up", 2 * config.ffn)
    return replace(plain, uncompiled=Uncompiled(wide_heads(config), (norms, gated)))


def norms_of_all_heads(c: ModelConfig) -> tuple[Cost, ...]:
    """What is kept besides, for the norms of all queries and all keys."""
    return (
        Cost("q k v before the norms", c.query_width + 2 * c.key_width),
        Cost("the norms' scales", 2, "fp32"),
    )


class Block(block.Block):
    """q k v → norms of q and k → rope → attention → o → norm → SwiGLU → norm."""

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__(config, index, execution)
        c = config
        qkv_rows = c.query_width + 2 * c.key_width
        self.qkv = new_parameter(qkv_rows, c.hidden)
        self.qkv_bias = new_parameter(qkv_rows) if c.qkv_bias else None
        self.q_norm = new_parameter(c.query_width)
        self.k_norm = new_parameter(c.key_width)
        self.o = new_parameter(c.hidden, c.query_width)
        self.o_bias = new_parameter(c.hidden) if c.o_bias else None
        self.norm_1 = new_parameter(c.hidden)
        self.gate_up = new_parameter(2 * c.ffn, c.hidden)
        self.down = new_parameter(c.hidden, c.ffn)
        self.norm_2 = new_parameter(c.hidden)

    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        return self.by_head(F.linear(x_tD.to(self.qkv.dtype), self.qkv, self.qkv_bias))

    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_k_v(heads_tJH)
        eps = self.config.norm_eps
        # A norm goes over all heads: none is on another rank before the all-to-all
        q_tE = rms_norm(q.flatten(1), self.q_norm, eps)
        k_tE = rms_norm(k.flatten(1), self.k_norm, eps)
        return rotate(q_tE.view(q.shape), cos, sin), rotate(k_tE.view(k.shape), cos, sin), v

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        eps = self.config.norm_eps
        x_tD = x_tD + rms_norm(F.linear(a_tE, self.o, self.o_bias), self.norm_1, eps)
        added = swiglu(x_tD.to(self.gate_up.dtype), self.gate_up, self.down)
        return x_tD + rms_norm(added, self.norm_2, eps)

    def stored(self) -> list[Stored]:
        return [
            *normed_attention(self.config),
            *gate_up_down(self.config),
            Stored("post_attention_layernorm.weight", "norm_1"),
            Stored("post_feedforward_layernorm.weight", "norm_2"),
        ]
