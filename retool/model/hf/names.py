"""What Hugging Face calls a decoder's parameters outside its layers, and how a family says the rest."""

from __future__ import annotations

from typing import NamedTuple

from retool.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.{}."
FINAL_NORM = "model.norm.weight"
# How names end of what the config gives: older exports hold the rotary frequencies
COMPUTED = "rotary_emb.inv_freq"
HEAD = "lm_head.weight"  # not stored where it is tied to the embedding


class Stored(NamedTuple):
    """A Hugging Face parameter and the parameter of ours that holds it.

    Several may be stacked in one of ours: `rows` of it belong to this name (None: all).
    """

    name: str
    parameter: str
    rows: int | None = None


def query_key_value(config: ModelConfig) -> list[Stored]:
    """A layer's three matrices in front of attention, each with its bias, stacked in `qkv`."""
    rows = {"q": config.query_width, "k": config.key_width, "v": config.key_width}
    return [
        Stored(f"self_attn.{matrix}_proj.{kind}", parameter, count)
        for matrix, count in rows.items()
        for kind, parameter in (("weight", "qkv"), ("bias", "qkv_bias"))
    ]


def normed_attention(config: ModelConfig) -> list[Stored]:
    """An attention layer's matrices, with their biases, and its norms of queries and keys."""
    return [
        *query_key_value(config),
        Stored("self_attn.o_proj.weight", "o"),
        Stored("self_attn.o_proj.bias", "o_bias"),
        Stored("self_attn.q_norm.weight", "q_norm"),
        Stored("self_attn.k_norm.weight", "k_norm"),
    ]


def gate_up_down(config: ModelConfig) -> list[Stored]:
    """A gated MLP's three matrices without biases, the first two stacked in `gate_up`."""
    return [
        Stored("mlp.gate_proj.weight", "gate_up", config.ffn),
        Stored("mlp.up_proj.weight", "gate_up", config.ffn),
        Stored("mlp.down_proj.weight", "down"),
    ]
