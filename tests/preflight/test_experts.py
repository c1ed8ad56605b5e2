"""What models with experts take: memory by all of them, FLOPs by those that a token runs through."""

from __future__ import annotations

import pytest

from retool.model.build import ModelOptions, plan_layout
from retool.model.costs import multiplied_parameters, parameter_count
from retool.model.families.read import parse_model_config
from retool.perf import GIB
from retool.preflight.plan import choose
from retool.preflight.training_memory import Setting, layer_bytes
from tests.preflight.test_memory import model, saved_bytes

# As published
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
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
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_what_an_expert_keeps_is_what_autograd_saves() -> None:
    """Of each token once for each of its experts."""
    tokens = 64

    def kept(each: int) -> tuple[int, int]:
        config = model(
            "qwen3_moe", num_experts=8, num_experts_per_tok=each, moe_intermediate_size=32
        )
        saved = saved_bytes(config, ModelOptions(), tokens)
        planned = layer_bytes(config, Setting(compute="fp32"), "none")
        return saved, planned * tokens * config.layers

    less, more = kept(1), kept(4)
    assert more[0] - less[0] == pytest.approx(more[1] - less[1], rel=0.02)


def test_30b_a3b_is_planned_for_eight_gpus() -> None:
    """30.5B parameters of which 3.3B are active, says its model card (embedding included)."""
    config = parse_model_config(QWEN3_30B_A3B)
    assert parameter_count(config) == pytest.approx(30.5e9, rel=2e-3)
    active = multiplied_parameters(config) + config.vocab * config.hidden
    assert active == pytest.approx(3.35e9, rel=5e-3)
    layout = plan_layout(config, 8)
    exact = sum(member.numel for _, member in layout.members)
    assert exact == pytest.approx(parameter_count(config), rel=1e-3)
    choice = choose(config, Setting(shards=8), 16_384, None, None, 140, "auto")
    assert choice.fits and choice.recompute == "selective"
    # 18 bytes of each parameter, and two units' turns: 80 GiB are too few without a way out
    assert 64 < choice.prediction.state / GIB < 80
    small = choose(config, Setting(shards=8), 16_384, None, None, 80, False)
    assert not small.fits
