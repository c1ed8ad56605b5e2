"""Shapes of decoders without a file and without transformers: a test says what it is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from retool.model.config import ModelConfig


def decoder_config(heads: int, kv_heads: int, family: str = "qwen2", **changes: Any) -> ModelConfig:
    """A small decoder with the switches that its family has; `changes` are `ModelConfig`'s fields."""
    small = ModelConfig(
        family,
        vocab=61,
        hidden=24,
        ffn=40,
        layers=2,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=8,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        tied=False,
        qkv_bias=family == "qwen2",
        o_bias=False,
        mlp_bias=False,
        qk_norm=family == "qwen3",
        max_position=0,
    )
    return replace(small, **changes)
