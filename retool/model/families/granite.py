"""Granite 3, the dense models: Llama's layer with four multipliers, as muP has them.

The list of families is in `retool.model.catalogue.families`.

Legend: t tokens of this rank · D model · E = channels of all query heads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from retool.model.block import rms_norm
from retool.model.config import ModelConfig
from retool.model.families import llama
from retool.model.families.llama import costs as costs
from retool.model.hf.fields import number, switch
from retool.model.hf.shape import read_shape

# beside those that every family has
FIELDS = frozenset(
    {
        "attention_bias",
        "mlp_bias",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
    }
)


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`attention_multiplier` stands where others have 1/√H; logits are divided by
    `logits_scaling`.
    """
    shape = read_shape(c, FIELDS)
    biased = switch(c, "attention_bias")
    return replace(
        shape,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=switch(c, "mlp_bias"),
        embedding_scale=number(c, "embedding_multiplier", 1.0),
        residual_scale=number(c, "residual_multiplier", 1.0),
        score_scale=number(c, "attention_multiplier", 1.0) * math.sqrt(shape.head_dim),
        logits_scale=1 / number(c, "logits_scaling", 1.0),
    )


class Block(llama.Block):
    """Llama's; what attention and the MLP add is multiplied with `residual_scale`."""

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        scale = self.config.residual_scale
        x_tD = x_tD + F.linear(a_tE, self.o, self.o_bias) * scale
        normed_tD = rms_norm(x_tD, self.norm_2, self.config.norm_eps)
        return x_tD + self.gated_mlp(normed_tD) * scale
