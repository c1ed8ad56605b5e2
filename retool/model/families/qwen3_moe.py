"""Qwen3's mixtures of experts (30B-A3B, 235B-A22B): its attention, and experts in every layer.

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
from retool.model.families import qwen3
from retool.model.hf import expert_fields
from retool.model.hf.fields import WINDOWS, size, switch, without_agreed
from retool.model.hf.names import Stored, normed_attention
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import in_every_layer, where_switched_on
from retool.model.layer_costs.cost import LayerCosts
from retool.model.layer_costs.dense import wide_heads
from retool.model.layer_costs.experts import expert_costs

# beside those that every family has
FIELDS = (
    WINDOWS
    | expert_fields.FIELDS
    | {"attention_bias", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}
)
KV_HEADS = 4  # transformers' defaults
EXPERTS = 128
PER_TOKEN = 8
WIDTH = 768
COEFFICIENT = 0.001
WINDOW = 4096


def read_config(
    c: dict[str, Any],
) -> ModelConfig:
    """`intermediate_size` is that of layers without experts, and there are none. A window that is
    switched on is in every layer, whatever `max_window_layers` says.
    """
    expert_fields.require_experts_everywhere(c)
    window = where_switched_on(c, WINDOW)
    windows = in_every_layer({**c, "sliding_window": window or None}, default=None)
    rest = without_agreed(c, qwen3.AGREED)
    shape = read_shape(rest, FIELDS, kv_heads=KV_HEADS, windows=windows)
    biased = switch(c, "attention_bias")
    width = size(c, "moe_intermediate_size", default=WIDTH)
    sizes = expert_fields.read_experts(
        c, count=EXPERTS, per_token=PER_TOKEN, width=width, coefficient=COEFFICIENT
    )
    return replace(shape, ffn=width, qkv_bias=biased, o_bias=biased, qk_norm=True, experts=sizes)


def costs(
    config: ModelConfig,
    sp: int,
) -> LayerCosts:
    return expert_costs(config, sp, qwen3.norms_of_heads(config), wide_heads(config))


class Block(qwen3.Block):
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
            *expert_layer.stored_experts(self.config),
            expert_layer.ROUTER,
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
        ]
