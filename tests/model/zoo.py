"""Tiny random models of architectures that have no file here: transformers' own, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# By model_type: what is other than in SHAPE
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 5},
    "codegen": {"rotary_dim": 4, **NO_DROPOUT},
    "ernie4_5": {},
    "exaone4": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma": {},
    "glm": {},
    "glm4": {},
    "gpt2": {**NO_DROPOUT},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4, **NO_DROPOUT},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    "jais2": {},
    "nemotron": {},
    "olmo": {},
    "opt": {"dropout": 0.0, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "persimmon": {},
    "phi": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "stablelm": {},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 9},
}


def tiny_config(model_type: str, **more: Any) -> dict[str, Any]:
    """The content of a small model's config.json."""
    kind = CONFIG_MAPPING[model_type]
    plain = kind()
    own = {**SHAPE, **ARCHITECTURES.get(model_type, {})}
    computed = {name for name in dir(kind) if isinstance(getattr(kind, name), property)}
    known = {
        name: value
        for name, value in own.items()
        if (hasattr(plain, name) or name in kind.attribute_map) and name not in computed
    }
    return {**json.loads(kind(**known).to_json_string()), **more}


def make_borrowed(folder: Path, model_type: str, **more: Any) -> PreTrainedModel:
    """Save a tiny random model in fp32 and return it; every parameter is random."""
    config = CONFIG_MAPPING[model_type].from_dict(tiny_config(model_type, **more))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model.eval()
