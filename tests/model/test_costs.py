"""FLOPs against a published figure and a count of every multiplication."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retool.model.catalogue.families import parse_model_config
from retool.model.config import ModelConfig
from retool.model.costs import (
    NO_QUADRATIC_LENGTH,
    model_flops,
    multiplied_parameters,
    quadratic_length,
)

QWEN = ModelConfig(
    "qwen2",
    vocab=151936,
    hidden=896,
    ffn=4864,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tied=True,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    max_position=32768,
)


def test_published_figure_for_qwen2_5_0_5b() -> None:
    """6·494M + 2.1G = 5.1 GFLOP per token at 16,384; 100 % of 989 TFLOP/s is then 194k tokens a
    second.
    """
    assert multiplied_parameters(QWEN) == pytest.approx(494e6, rel=2e-4)
    per_token = model_flops(QWEN, [16_384]) / 16_384
    assert per_token == pytest.approx(6 * 494e6 + 2.114e9, rel=1e-3)
    assert round(per_token / 1e9, 1) == 5.1
    assert 989e12 / per_token == pytest.approx(194e3, rel=5e-3)


def test_flops_equal_a_count_by_the_profiler_of_torch() -> None:
    """An untied dense model in transformers, forward and backward, counted operation by operation."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config)
    n = 48
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 96, (1, n))).logits.sum().backward()
    attention_full = 12 * n * n * 4 * 8 * 2  # eager attention computes the masked half too
    ours = model_flops(parse_model_config(config.to_dict()), [n])

    assert counter.get_total_flops() == pytest.approx(ours + attention_full / 2, rel=1e-3)


def test_documents_count_one_by_one_and_padding_not_at_all() -> None:
    assert (
        model_flops(QWEN, [100, 50])
        == model_flops(QWEN, [100]) + model_flops(QWEN, [50])
        < model_flops(QWEN, [150])
    )
    assert model_flops(QWEN, []) == 0


def test_a_window_leaves_the_pairs_that_are_seen() -> None:
    """Counted pair by pair; half a pair less for each token, as the causal square counts too."""
    layers = (0, 8, 100, 3)
    config = replace(QWEN, layers=4, windows=layers)
    plain = replace(QWEN, layers=4)
    n = 40
    width = QWEN.query_width
    matrices = 6.0 * multiplied_parameters(plain) * n
    pairs = sum(min(i + 1, w or n) for w in layers for i in range(n))
    less = sum((min(w or n, n)) for w in layers) / 2  # the diagonal's half
    assert model_flops(config, [n]) == pytest.approx(matrices + 12 * width * (pairs - less))
    assert model_flops(replace(config, windows=(n,) * 4), [n]) == model_flops(plain, [n])
    long = replace(config, windows=(0, 8_000, 4_000, 0))
    quadratic = quadratic_length(long)
    whole = 2 * 6.0 * width * quadratic**2  # of the two layers without a window
    assert model_flops(long, [quadratic]) == pytest.approx(2 * whole, rel=1e-2)
    assert quadratic_length(replace(config, windows=(8,) * 4)) == NO_QUADRATIC_LENGTH
