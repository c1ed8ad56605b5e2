"""OLMoE: norms of all queries and all keys of a token as in OLMo 2, one before each half of the layer
as in Llama, and experts in every layer (arXiv 2409.02060).

The list of families is in `retool.model.catalogue.families`.

Legend: t tokens of this rank · D model · E = channels of all query heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retool.batch import PackedBatch
from retool.model.block import Execution, PerToken, rms_norm
from retool.model.config import ModelConfig
from retool.model.experts import layer as expert_layer
from retool.model.families import olmo2
from retool.model.hf import expert_fields
from retool.model.hf.fields import refused, switch
from retool.model.hf.names import Stored, normed_attention
from retool.model.hf.shape import read_shape
from retool.model.layer_costs.cost import LayerCosts
from retool.model.layer_costs.dense import wide_heads
from retool.model.layer_costs.experts import expert_costs

# beside those that every family has
FIELDS = expert_fields.FIELDS | {"attention_bias"}
NORM_EPS = 1e-5  # transformers' defaults
EXPERTS = 64
PER_TOKEN = 8
COEFFICIENT = 0.01


def read_config(
    c: dict[str, Any],
) -> ModelConfig:
    """`intermediate_size` is an expert's."""
    if c.get("clip_qkv") is not None:
        raise ValueError(refused("clip_qkv", c["clip_qkv"]))
    shape = read_shape({"rms_norm_eps": NORM_EPS, **c}, FIELDS)
    biased = switch(c, "attention_bias")
    sizes = expert_fields.read_experts(
        c, count=EXPERTS, per_token=PER_TOKEN, width=shape.ffn, coefficient=COEFFICIENT
    )
    return replace(shape, qkv_bias=biased, o_bias=biased, experts=sizes)


def costs(
    config: ModelConfig,
    sp: int,
) -> LayerCosts:
    return expert_costs(config, sp, olmo2.norms_of_all_heads(config), wide_heads(config))


class Block(olmo2.Block):
    """norm → q k v → norms of q and k → rope → attention → o → norm → experts."""

    after_is_compilable = False
    router: nn.Parameter

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        execution: Execution,
    ) -> None:
        super().__init__(config, index, execution)
        expert_layer.add_experts(self)

    def projected(
        self,
        x_tD: torch.Tensor,
    ) -> torch.Tensor:
        normed_tD = rms_norm(x_tD, self.norm_1, self.config.norm_eps)
        return self.by_head(F.linear(normed_tD, self.qkv, self.qkv_bias))

    def per_token(
        self,
        batch: PackedBatch,
    ) -> PerToken:
        return expert_layer.experts_of(batch, self.index)

    def after(
        self,
        x_tD: torch.Tensor,
        a_tE: torch.Tensor,
        *beside: torch.Tensor | None,
    ) -> torch.Tensor:
        x_tD = x_tD + F.linear(a_tE, self.o, self.o_bias)
        normed_tD = rms_norm(x_tD, self.norm_2, self.config.norm_eps)
        return x_tD + expert_layer.mixture(self, normed_tD, *beside)

    def fused(self) -> list[tuple[str, str]]:
        return expert_layer.FUSED

    def divided(self) -> list[str]:
        return expert_layer.DIVIDED

    def stored(self) -> list[Stored]:
        return [
            *normed_attention(self.config),
            expert_layer.ROUTER,
            *expert_layer.stored_experts(self.config),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
        ]
