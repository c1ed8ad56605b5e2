"""Phi-3 and Phi-4 with plain rope, Phi-4 (14B) among them: Llama's layer under other names.

The small ones have LongRoPE, and Phi-4-mini rotates a part of each head: both are refused by name.

The list of families is in `retool.model.families.read`.
"""

from __future__ import annotations

from typing import Any

from retool.model.config import ModelConfig
from retool.model.families import llama
from retool.model.families.hf_names import Stored
from retool.model.families.llama import costs as costs
from retool.model.hf_config.fields import WINDOWS, refused
from retool.model.hf_config.shape import read_shape

FIELDS = WINDOWS  # beside those that every family has
NORM_EPS = 1e-5  # transformers' default


def read_config(c: dict[str, Any]) -> ModelConfig:
    if c.get("sliding_window") is not None:
        raise ValueError(refused("sliding_window", c["sliding_window"]))
    shape = read_shape({"rms_norm_eps": NORM_EPS, **c}, FIELDS)
    if shape.rope_scaling is not None:
        # transformers takes "yarn" for LongRoPE here, and knows no other
        name = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
        raise ValueError(refused(name, c.get(name)))
    return shape


class Block(llama.Block):
    """Llama's; q, k and v are one matrix in the file, gate and up another."""

    def stored(self) -> list[Stored]:
        return [
            Stored("self_attn.o_proj.weight", "o"),
            Stored("self_attn.qkv_proj.weight", "qkv"),
            Stored("mlp.gate_up_proj.weight", "gate_up"),
            Stored("mlp.down_proj.weight", "down"),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
        ]
