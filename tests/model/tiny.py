"""Tiny random models of each family, made by transformers: the oracle of the decoder tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 128,
}
# Divisors of the pairs of channels that turn: three of a head's four
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 7.0],
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
}
THETA_OF_ITS_OWN = {"rope_type": "default", "rope_theta": 700.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
# Within the tiny vocabulary; a padding token would get no gradient from transformers.
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "output_router_logits": True}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-bias": (
        LlamaConfig,
        LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"tie_word_embeddings": False, "rope_parameters": YARN},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "ministral": (
        MinistralConfig,
        MinistralForCausalLM,
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1], **TOKENS}),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {**MULTIPLIERS, "tie_word_embeddings": True},
    ),
    "granite4": (
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        {
            **MULTIPLIERS,
            "layer_types": ["full_attention"] * 3,
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
        },
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {**TOKENS, "attention_bias": True}),
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {
            **TOKENS,
            "sliding_window": 6,
            "num_hidden_layers": 4,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": THETA_OF_ITS_OWN},
        },
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            **TOKENS,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
            # The one that caps scores
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **TOKENS,
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 9,
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, TOKENS),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**EXPERTS, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "olmoe": (
        OlmoeConfig,
        OlmoeForCausalLM,
        {**EXPERTS, **TOKENS, "intermediate_size": 32, "attention_bias": True},
    ),
    "phi4-mini": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            **TOKENS,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
    "llama-dynamic": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
    ),
}


def make(folder: Path, family: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """Save a tiny random model of `family` in fp32 and return it.

    Every parameter is random, norms and biases too.
    """
    torch.manual_seed(seed)
    config_class, model_class, extra = FAMILIES[family]
    model = model_class(config_class(**{**SHAPE, **extra, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model.eval()


def stored_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients by the names that parameters have on disk, in the order of `parameters()`.

    In memory transformers fuses what experts have on disk one by one.
    """
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        layer, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for number, expert in enumerate(grad):
                gate, up = expert.chunk(2)
                found[f"{layer}.experts.{number}.gate_proj.weight"] = gate
                found[f"{layer}.experts.{number}.up_proj.weight"] = up
                found[f"{layer}.experts.{number}.down_proj.weight"] = torch.empty(0)
        elif kind == "down_proj":
            for number, expert in enumerate(grad):
                found[f"{layer}.experts.{number}.down_proj.weight"] = expert
        else:
            found[name] = grad
    return found
