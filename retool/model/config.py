"""What a Hugging Face `config.json` says of a model, for the families that we implement; anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rope scaling: low frequencies divided by `factor`, high ones kept, a ramp between (Meta's `apply_scaling`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder. D = hidden, F = ffn, N / K = query / kv heads, H = head_dim, V = vocab."""

    family: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position: int

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: all of them but an untied embedding."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.vocab * self.hidden


def read_model_config(folder: str | Path) -> ModelConfig:
    """Read `folder/config.json`. ValueError names an unknown `model_type` or a switch that isn't implemented."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"the model folder {folder} has no config.json. {_model_inside(path.parent)}")
    try:
        return parse_model_config(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model_inside(folder: Path) -> str:
    """Where the model is, if `folder` is a checkpoint of a run."""
    for inside in (folder / "huggingface", folder / "actor" / "huggingface"):
        if any(inside.glob("*.safetensors")):
            return f"The checkpoint's model is in {inside}: give that."
        if (inside / "config.json").is_file():
            return f"Make a model of this checkpoint: python -m retool.checkpoint merge {folder} --out DIR, and give DIR."
    return "Give a Hugging Face model folder: config.json, tokenizer and safetensors."


def parse_model_config(c: dict[str, Any]) -> ModelConfig:
    """A `config.json` dict → ModelConfig; transformers 4's `rope_theta` and 5's `rope_parameters` are both read."""
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not implemented. Implemented: {', '.join(FAMILIES)}.")
    _refuse_switches(c)
    heads, hidden = c["num_attention_heads"], c["hidden_size"]
    theta, scaling = _rope(c)
    bias = bool(c.get("attention_bias", False))
    kv_heads = c.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}.")
    return ModelConfig(
        family=family, vocab=c["vocab_size"], hidden=hidden, ffn=c["intermediate_size"], layers=c["num_hidden_layers"],
        heads=heads, kv_heads=kv_heads, head_dim=c.get("head_dim") or hidden // heads, norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=theta, rope_scaling=scaling, tied=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=True if family == "qwen2" else bias, o_bias=False if family == "qwen2" else bias,
        mlp_bias=bool(c.get("mlp_bias", False)), qk_norm=family == "qwen3", max_position=c.get("max_position_embeddings", 0),
    )  # fmt: skip


def _rope(c: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling from either spelling."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta", c.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor is not implemented.")
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return float(theta), Llama3Scaling(factor, low, high, int(rope["original_max_position_embeddings"]))
    raise ValueError(f"rope type {kind!r} is not implemented. Implemented: default, llama3.")


def _refuse_switches(c: dict[str, Any]) -> None:
    """Refuse by name what would silently compute something else."""
    layer_types = set(c.get("layer_types") or [])
    refused = {
        "use_sliding_window": bool(c.get("use_sliding_window")),
        "sliding_window": c["model_type"] == "llama" and c.get("sliding_window") is not None,
        "layer_types": bool(layer_types - {"full_attention"}),
        "hidden_act": c.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_dropout": bool(c.get("attention_dropout")),
        "quantization_config": bool(c.get("quantization_config")),
    }
    for name, bad in refused.items():
        if bad:
            raise ValueError(f"{name}={c[name]!r} is not implemented.")
