"""Files of models as they are published, and files that say the least: whatever a family reads of one is
what transformers reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.model.borrowed.read import read_any_config
from retool.model.catalogue.families import FAMILIES, parse_model_config
from retool.model.config import ModelConfig
from retool.parallel.mesh import make_mesh
from tests.model import tiny

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3 = {
    **QWEN_2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
SMOLLM_2 = {
    **LLAMA_2,
    "hidden_size": 576,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "tie_word_embeddings": True,
}
# As their makers published them, but for numbers that say nothing here.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2": LLAMA_2,
    "Llama-3.1": {
        **LLAMA_3,
        "rope_scaling": {**LLAMA_3["rope_scaling"], "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "Llama-3.2": LLAMA_3,
    "TinyLlama": {
        **LLAMA_2,
        "attention_bias": False,
        "hidden_size": 2048,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "SmolLM2": SMOLLM_2,
    "Qwen2.5": QWEN_2,
    "Qwen2.5-Math": {
        **QWEN_2,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "use_mrope": False,
    },
    "Qwen2.5-1M": {
        **QWEN_2,
        "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192},
    },
    "QwQ": {
        **QWEN_2,
        "max_window_layers": 64,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "num_hidden_layers": 64,
    },
    "R1-Distill-Qwen": {
        **QWEN_2,
        "use_mrope": False,
        "tie_word_embeddings": False,
        "bos_token_id": 151646,
        "eos_token_id": 151643,
    },
    "R1-Distill-Llama": {**LLAMA_3, "tie_word_embeddings": False},
    "Qwen3": QWEN_3,
    "saved by transformers 5": {
        **QWEN_3,
        "rope_scaling": None,
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 28,
        "pad_token_id": None,
        "transformers_version": "5.24.0",
    },
    "saved by unsloth": {
        **QWEN_3,
        "unsloth_fixed": True,
        "unsloth_version": "2025.9.1",
        "pad_token_id": 151654,
    },
    "with what transformers 4 wrote": {
        **LLAMA_3,
        "return_dict": True,
        "output_hidden_states": False,
        "output_attentions": False,
        "torchscript": False,
        "pruned_heads": {},
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "max_length": 20,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "tokenizer_class": None,
        "_attn_implementation_autoset": True,
        "model_max_length": 131072,
        "neftune_noise_alpha": None,
    },
}


MISTRAL = {
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
PHI_3 = {
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
GEMMA_2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3 = {
    **GEMMA_2,
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
OLMO_2 = {
    "model_type": "olmo2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
GRANITE_3 = {
    "model_type": "granite",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49159,
}
QWEN_3_MOE = {
    **QWEN_3,
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
PUBLISHED |= {
    "Mistral 7B v0.1": MISTRAL,
    "Mistral 7B v0.3": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768},
    "Mistral Nemo": {**MISTRAL, "sliding_window": None, "head_dim": 128, "hidden_size": 5120},
    "Phi-3-mini": PHI_3,
    "Phi-4-mini": {
        **PHI_3,
        "auto_map": {**PHI_3["auto_map"], "AutoTokenizer": "Xenova/gpt-4o"},
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": [1.5] * 48,
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "Gemma 2, 2B": GEMMA_2,
    "Gemma 2, 27B": {
        **GEMMA_2,
        "head_dim": 128,
        "num_attention_heads": 32,
        "query_pre_attn_scalar": 144,
        "sliding_window_size": 4096,
    },
    "Gemma 3, 1B": GEMMA_3,
    "Gemma 3, 4B, its text model": {
        **GEMMA_3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "OLMo 2": OLMO_2,
    "OLMo 3": {
        **OLMO_2,
        "model_type": "olmo3",
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "sliding_window": 4096,
    },
    "Granite 3": GRANITE_3,
    "Granite 4 Micro": {
        **GRANITE_3,
        "model_type": "granitemoehybrid",
        "init_method": "mup",
        "layer_types": ["attention"] * 40,
        "mamba_n_heads": 64,
        "mamba_expand": 2,
        "normalization_function": "rmsnorm",
        "num_experts_per_tok": 0,
        "num_local_experts": 0,
        "output_router_logits": False,
        "position_embedding_type": "rope",
        "router_aux_loss_coef": 0.01,
        "shared_intermediate_size": 8192,
    },
    "SmolLM3": {
        **LLAMA_3,
        "model_type": "smollm3",
        "hidden_size": 2048,
        "head_dim": 128,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Qwen3-30B-A3B": QWEN_3_MOE,
    "Qwen3-Coder-30B-A3B": {
        **QWEN_3_MOE,
        "intermediate_size": 5472,
        "qkv_bias": False,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": 0,
        "use_qk_norm": True,
    },
    "OLMoE": {
        **OLMO_2,
        "model_type": "olmoe",
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    },
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 256,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}
LEAST: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 24,
        "num_local_experts": 0,
        "mamba_n_heads": 32,
    },
}
BALANCED = {"output_router_logits": True}
# Files that say nothing but sizes: what is left out is transformers' default
for name in FAMILIES:
    PUBLISHED[f"the least of {name}"] = {"model_type": name, **SIZES, **LEAST.get(name, {})}
for name in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
    # Which layers have it is left out too
    windows = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20}
    PUBLISHED[f"{name} with windows"] = {"model_type": name, **SIZES, **windows}
for name in ("qwen3_moe", "olmoe"):
    PUBLISHED[f"{name} with its balance loss"] = {"model_type": name, **SIZES, **BALANCED}
PUBLISHED["qwen2 with windows that are left out"] = {
    "model_type": "qwen2",
    **SIZES,
    "use_sliding_window": True,
    "max_window_layers": 0,
}
PUBLISHED["qwen2 with windows from a layer on that is left out"] = {
    "model_type": "qwen2",
    **SIZES,
    "num_hidden_layers": 32,
    "use_sliding_window": True,
    "sliding_window": 512,
}
PUBLISHED["phi3 without its original length"] = {
    "model_type": "phi3",
    **SIZES,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
}
# A window in every layer, whatever `layer_types` says
EVERYWHERE = ("mistral", "phi3", "qwen3_moe")


def read_by_transformers(content: dict[str, Any]) -> dict[str, Any]:
    """What transformers takes for the fields of our `ModelConfig`."""
    c = AutoConfig.for_model(**{name: v for name, v in content.items() if name != "auto_map"})
    layers = c.num_hidden_layers
    wide = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kinds = getattr(c, "layer_types", None) or ["full_attention"] * layers
    window = getattr(c, "sliding_window", None) or 0
    if c.model_type in EVERYWHERE:
        windows = [window] * layers
    else:
        windows = [window if kind == "sliding_attention" else 0 for kind in kinds]
    rope: dict[str, Any] = c.rope_parameters or {"rope_theta": 10_000.0}
    windowed = None
    if "full_attention" in rope:
        windowed = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rotated = getattr(c, "no_rope_layers", None) or [1] * layers
    if getattr(c, "position_embedding_type", "rope") != "rope":
        rotated = [0] * layers
    experts = None
    if hasattr(c, "num_experts"):
        width = getattr(c, "moe_intermediate_size", c.intermediate_size)
        balance = c.router_aux_loss_coef if c.output_router_logits else 0.0
        sizes = (c.num_experts, c.num_experts_per_tok, width)
        experts = (*sizes, c.norm_topk_prob, balance)
    # An expert's, or what Granite calls the shared expert's
    names = ("moe_intermediate_size", "shared_intermediate_size", "intermediate_size")
    wide_mlp = next(getattr(c, name) for name in names if hasattr(c, name))
    # Gemma's scalar stands in for H in 1/√H, Granite's multiplier for all of it
    scores = getattr(c, "query_pre_attn_scalar", wide) ** -0.5
    return {
        "ffn": wide_mlp,
        "kv_heads": c.num_key_value_heads,
        "head_dim": wide,
        "norm_eps": c.rms_norm_eps,
        "tied": c.tie_word_embeddings,
        "theta": rope["rope_theta"],
        "scaled": rope.get("rope_type", "default") != "default",
        "original length": rope.get("original_max_position_embeddings"),
        "turned": int(wide * rope.get("partial_rotary_factor", 1)),
        "window theta": windowed,
        "windows": windows,
        "unrotated": [i for i in range(layers) if not rotated[i]],
        "score cap": getattr(c, "attn_logit_softcapping", None) or 0.0,
        "logits cap": getattr(c, "final_logit_softcapping", None) or 0.0,
        "scores": pytest.approx(getattr(c, "attention_multiplier", scores)),
        "logits": pytest.approx(1 / getattr(c, "logits_scaling", 1.0)),
        "residual": getattr(c, "residual_multiplier", 1.0),
        "experts": experts,
    }


def read_here(c: ModelConfig) -> dict[str, Any]:
    sizes = c.experts
    experts = None
    if sizes is not None:
        chosen = (sizes.count, sizes.per_token, sizes.width)
        experts = (*chosen, sizes.normalised, sizes.balance_coefficient)
    return {
        "ffn": c.ffn,
        "kv_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "norm_eps": c.norm_eps,
        "tied": c.tied,
        "theta": c.rope_theta,
        "scaled": c.rope_scaling is not None,
        "original length": getattr(c.rope_scaling, "original_max_position", None),
        "turned": c.turned_channels,
        "window theta": None if c.window_rope is None else c.window_rope[0],
        "windows": [c.window(i) for i in range(c.layers)],
        "unrotated": list(c.unrotated),
        "score cap": c.score_cap,
        "logits cap": c.logits_cap,
        "scores": c.score_scale / c.head_dim**0.5,
        "logits": c.logits_scale,
        "residual": c.residual_scale,
        "experts": experts,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read_as_transformers_reads_it(name: str) -> None:
    config = PUBLISHED[name]
    if config.get("rope_theta", 0) is None:
        config = {k: v for k, v in config.items() if k != "rope_theta"}
    ours = parse_model_config(config)
    theirs = read_by_transformers(config)
    found = read_here(ours)
    assert found.keys() == theirs.keys()
    for field, value in theirs.items():
        assert found[field] == value, field


# What can't be trained, and what the refusal names
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        ["quantization_config={", "before it was quantised", "code of its own"],
    ),
    "InternLM2": (
        {
            "model_type": "internlm2",
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        },
        ["model_type 'internlm2'", "code of its own", "Implemented: "],
    ),
    "MiniCPM": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"}},
        ["model_type None", "code of its own"],
    ),
    "Mistral Small 3.1": (
        {"model_type": "mistral3", "text_config": MISTRAL, "vision_config": {}},
        ["model_type 'mistral3'", "vision_config and text_config are there", "docs/models.md"],
    ),
    "Qwen2.5-VL": (
        {**QWEN_2, "model_type": "qwen2_5_vl", "vision_config": {}},
        ["model_type 'qwen2_5_vl'", "vision_config is there", "docs/models.md"],
    ),
    "Gemma 3, 4B": (
        {"model_type": "gemma3", "text_config": {}, "vision_config": {}},
        ["vision_config and text_config are there", "docs/models.md"],
    ),
    "Granite 3.0": ({**GRANITE_3, "attention_dropout": 0.1}, ["write 0 in the file"]),
    "Seed-OSS": (
        {"model_type": "seed_oss", "attention_dropout": 0.1, "residual_dropout": 0.1},
        ["residual_dropout=0.1", "attention_dropout=0.1", "write 0 in the file"],
    ),
    "R1-0528-Qwen3": (
        {
            **QWEN_3,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "attn_factor": 0.8782488562869419,
            },
        },
        ["attn_factor=0.878", "take it out of the file"],
    ),
    "a bitsandbytes copy": (
        {**LLAMA_3, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ["quantization_config={", "before it was quantised"],
    ),
    "Phi-3 with other code": (
        {**PHI_3, "auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"}},
        ["code of its own"],
    ),
    "Phi-3 with layers of another kind": ({**PHI_3, "full_attn_mod": 2}, ["full_attn_mod=2"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_published_and_cannot_be_trained_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    content, named = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as refusal:
        read_any_config(tmp_path)
    for words in named:
        assert words in str(refusal.value)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_model_of_one_with_images_trains(tmp_path: Path, kind: str) -> None:
    """As the docs take it out."""
    folder = tmp_path / "whole"
    text = {**tiny.SHAPE, "head_dim": 16, "sliding_window": 6}
    if kind == "gemma3":
        config = transformers.Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=1, image_token_index=5
        )
        whole = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = transformers.Mistral3Config(
            text_config={**text, "model_type": "mistral"},
            vision_config={**VISION, "model_type": "pixtral", "head_dim": 16},
            image_token_index=5,
            tie_word_embeddings=False,
        )
        whole = transformers.Mistral3ForConditionalGeneration(config)
    whole.save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    (shown,) = re.findall(r"```python\n(from transformers.*?)```", DOCS.read_text(), re.DOTALL)
    code = shown.replace("google/gemma-3-4b-it", str(folder)).replace(
        '"text"', repr(str(tmp_path / "text"))
    )
    exec(code, {})

    ours = load_pretrained(tmp_path / "text", make_mesh())
    tokens = np.arange(20, 40, dtype=np.int32)
    batch = pack([Sample(tokens, np.ones(20, bool))])
    with torch.no_grad():
        found = ours(batch, lambda hidden, weight: hidden @ weight.t())
        wanted = whole.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
