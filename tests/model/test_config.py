"""What a `config.json` means: real models are taken, and whatever is taken computes what
transformers computes from the same file.
"""

from __future__ import annotations

import json
import random
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from retool.batch import pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.model.build import ModelOptions
from retool.model.catalogue.families import FAMILIES, parse_model_config, read_model_config
from retool.parallel.mesh import make_mesh
from tests.model.test_decoder import logits, relative, sample
from tests.model.tiny import LLAMA3, LONGROPE, SHAPE

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 77_000.0}
NOT_DONE: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional'"),
    ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor has 1 numbers"),
    ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": 2.0}}, "short_factor=2.0"),
    ("phi3", {"partial_rotary_factor": 0.7}, "partial_rotary_factor=0.7"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "lacks short_factor"),
    ("qwen3", {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 2.0}}, "beta_fast=1.0"),
    ("qwen2", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
    (
        "qwen2",
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        "rope_scaling and rope_parameters",
    ),
    (
        "llama",
        {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "default"}},
        "rope_scaling and rope_parameters",
    ),
    (
        "qwen3",
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        "full_attention",
    ),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "factor"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    (
        "llama",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_theta": "1e6"}, "rope_theta='1e6'"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear'"),
    ("llama", {"is_causal": False}, "is_causal=False"),
    ("llama", {"is_causal": None}, "is_causal=None"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"qk_norm": True}, "qk_norm=True"),
    ("llama", {"attention_multiplier": 0.5}, "attention_multiplier=0.5"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
    (
        "qwen3",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        "layer_types",
    ),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("qwen2", {"quantization": {"bits": 4}}, "quantization="),
    ("qwen2", {"per_layer_config": {"1": {"rope_theta": 5.0}}}, "per_layer_config"),
    ("qwen2", {"auto_map": {"AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}}, "auto_map"),
    ("qwen2", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ("llama", {"head_dim": 7}, "head_dim=7"),
    ("llama", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ("mistral", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("ministral", {"layer_types": ["sliding_attention"] * 2}, "layer_types names 2 layers"),
    ("ministral", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("olmo2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": "4"}, "sliding_window='4'"),
    ("olmo3", {"rope_parameters": PLAIN}, "rope_parameters"),
    ("olmo3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    (
        "olmo3",
        {"rope_parameters": {"full_attention": {**YARN, "truncate": False}}},
        "full_attention.truncate=False",
    ),
    ("olmo3", {"sliding_window": None}, "layer_types"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0"),
    ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping='30'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    ("granite", {"logits_scaling": 0}, "logits_scaling=0"),
    ("granitemoehybrid", {"layer_types": ["mamba"] * 3}, "layer_types"),
    ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts=4"),
    ("phi3", {"sliding_window": 1.5}, "sliding_window=1.5"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
    ("phi3", {"rope_scaling": YARN}, "lacks short_factor"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
]


@pytest.mark.parametrize(("family", "change", "named"), NOT_DONE)
def test_what_would_compute_something_else_is_refused_by_name(
    family: str, change: dict[str, Any], named: str
) -> None:
    plain = {"model_type": family, **SHAPE, **NEEDED.get(family, {})}
    parse_model_config(plain)
    with pytest.raises(ValueError) as refusal:
        parse_model_config({**plain, **change})
    assert named in str(refusal.value)


def test_a_window_that_no_layer_has_is_none() -> None:
    sliding = {"model_type": "qwen2", **SHAPE, "use_sliding_window": True, "sliding_window": 4}
    layers = SHAPE["num_hidden_layers"]
    assert parse_model_config({**sliding, "max_window_layers": layers}).layers == layers
    assert (
        parse_model_config(
            {**sliding, "max_window_layers": 0, "layer_types": ["full_attention"] * 3}
        ).layers
        == layers
    )
    assert (
        parse_model_config({**sliding, "max_window_layers": 0, "sliding_window": None}).layers
        == layers
    )


def repr_of(value: object) -> str:
    return reprlib.repr(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 2e9),
        ("hidden_size", -(10**400)),
        ("num_hidden_layers", 2_000_000_000),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("hidden_size", "64"),
        ("hidden_size", None),
        ("vocab_size", 10**40),
        ("head_dim", [64]),
        ("num_key_value_heads", {}),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", ["x"] * 10**6),
        ("rope_theta", 0),
        ("max_position_embeddings", -3),
    ],
    ids=repr_of,
)
def test_a_size_that_is_none_is_refused_at_once(name: str, value: object) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_model_config({"model_type": "llama", **SHAPE, name: value})
    assert name in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 200_000,
        "3",
        "{",
        "",
        '{"model_type": ["llama"]}',
        '{"model_type": "llama"}',
        "\ud800",
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"config\.json") as refusal:
        read_model_config(tmp_path)
    assert len(str(refusal.value)) < 600


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ValueError, match="bytes"):
        read_model_config(tmp_path)


# --- the same file read by transformers ---

ROPES: list[dict[str, Any] | None] = [
    None,
    {},
    PLAIN,
    {**PLAIN, "rope_theta": 500.0},
    LLAMA3,
    {**LLAMA3, "factor": 2.0},
    {"type": "default"},
    YARN,
    {**YARN, "beta_fast": 8.0, "beta_slow": None, "truncate": False},
    {**YARN, "attention_factor": 0.7},
    {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
    {**YARN, "factor": 0.5, "mscale": 0.8},
    {"type": "yarn", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_theta": 300.0},
    {"factor": 2.0},
    {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    {"full_attention": PLAIN, "sliding_attention": {**PLAIN, "rope_theta": 100.0}},
    {"full_attention": PLAIN},
    {**PLAIN, "partial_rotary_factor": 0.5},
    {**PLAIN, "partial_rotary_factor": 1.0},
    {**YARN, "type": "default"},
    LONGROPE,
    {**LONGROPE, "type": "su", "rope_type": "su", "attention_factor": 1.3},
    {
        "type": "longrope",
        "short_factor": [1.0, 1.2, 1.5, 2.0],
        "long_factor": [1.0, 4.0, 9.0, 16.0],
        "factor": 16.0,
    },
]
CHANGES: dict[str, list[Any]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [200.0, 1000000, 10000.0],
    "original_max_position_embeddings": [16, 64],
    "max_position_embeddings": [16, 4096],
    "partial_rotary_factor": [0.5, 0.75, 1.0],
    "is_causal": [True, False, None],
    "use_sliding_window": [True, False],
    "sliding_window": [2, 4, 40, 4096, None],
    "max_window_layers": [0, 1, 3, 28],
    "layer_types": [
        ["full_attention"] * 3,
        ["full_attention", "sliding_attention", "full_attention"],
        ["sliding_attention"] * 3,
        None,
    ],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "hidden_act": ["silu", "swish", "gelu", "relu"],
    "rms_norm_eps": [1e-5, 1e-2, 0.5],
    "tie_word_embeddings": [True, False],
    "num_key_value_heads": [1, 2, 3, 6, None],
    "head_dim": [4, 8, 16, None],
    "attention_dropout": [0.0, 0.3],
    "pretraining_tp": [1, 2],
    "use_mrope": [False, True],
    "rope_interleaved": [False, True],
    "qk_norm": [True],
    "no_rope_layers": [[1, 0, 1], [1, 1, 1, 0], [0, 1], [1, 2, 1], None],
    "no_rope_layer_interval": [1, 2, 4],
    "rope_local_base_freq": [100.0],
    "query_pre_attn_scalar": [4, 64],
    "sliding_window_pattern": [1, 2, 3],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu"],
    "final_logit_softcapping": [5.0, None],
    "attn_logit_softcapping": [3.0, None],
    "embedding_multiplier": [12.0, 1],
    "logits_scaling": [8.0],
    "residual_multiplier": [0.22],
    "attention_multiplier": [0.015625, 1.0],
    "chunk_size_feed_forward": [0, 8],
    "per_layer_config": [{"1": {"rms_norm_eps": 0.9}}, {}, None],
    "initializer_range": [0.02],
    "pad_token_id": [0, 3],
}


# Without these a family is refused.
NEEDED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # left out it is 4,096
    "gemma2": {"head_dim": 16, "sliding_window": 5},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5},
    "olmo3": {"sliding_window": 5},
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 3,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
    },
}
# What only some families have is drawn for those.
GEMMAS = ("gemma2", "gemma3_text")
OWN = {
    "no_rope_layers": ("smollm3",),
    "no_rope_layer_interval": ("smollm3",),
    "rope_local_base_freq": ("gemma3_text",),
    "query_pre_attn_scalar": GEMMAS,
    "sliding_window_pattern": ("gemma3_text",),
    "hidden_activation": GEMMAS,
    "final_logit_softcapping": GEMMAS,
    "attn_logit_softcapping": GEMMAS,
    "embedding_multiplier": ("granite",),
    "logits_scaling": ("granite",),
    "residual_multiplier": ("granite",),
    "attention_multiplier": ("granite",),
}


def draw(rng: random.Random) -> dict[str, Any]:
    """A configuration with a few fields changed: no two of them need to make sense together."""
    family = rng.choice(sorted(FAMILIES))
    config: dict[str, Any] = {"model_type": family, **SHAPE, **NEEDED.get(family, {})}
    fields = sorted(name for name in CHANGES if family in OWN.get(name, (family,)))
    names = rng.sample(fields, rng.randint(1, 5))
    ropes = rng.sample(["rope_scaling", "rope_parameters", "rope_theta"], rng.randint(0, 2))
    return config | {
        name: json.loads(json.dumps(rng.choice(CHANGES[name]))) for name in (*names, *ropes)
    }


def compare(folder: Path, config: dict[str, Any]) -> str:
    """Whether the file was taken (and then computes the same logits), refused by us, or refused by
    transformers.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    try:
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        rng = np.random.default_rng(0)
        samples = [sample(rng, n) for n in (40, 3)]
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.3)
            rows = [
                theirs(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0] for s in samples
            ]
    except Exception:  # whatever transformers raises: there is nothing to compare with
        return "impossible"
    tied = theirs.config.tie_word_embeddings
    weights = {
        name: tensor.contiguous()
        for name, tensor in theirs.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    try:
        ours = load_pretrained(folder, make_mesh(), ModelOptions(master_dtype=torch.float64))
    except ValueError:
        return "refused"
    with torch.no_grad():
        assert relative(ours(pack(samples), logits), torch.cat(rows)) < 1e-5, json.dumps(config)
    return "taken"


def fuzz(folder: Path, seeds: range) -> dict[str, int]:
    outcomes = [compare(folder / str(seed), draw(random.Random(seed))) for seed in seeds]
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


# One field each that no small model of `tests.model.tiny` has otherwise than by default
COMPUTED: dict[str, dict[str, Any]] = {
    "biases of attention": {"model_type": "qwen3", "attention_bias": True},
    "as many heads of keys": {"model_type": "qwen2", "num_key_value_heads": None},
    # The ramp begins and ends between channels 2 and 6
    "YaRN between channels": {
        "model_type": "qwen2",
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2200,
            "truncate": False,
        },
    },
    "positions divided": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "YaRN where windows are": {
        "model_type": "olmo3",
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": PLAIN,
            "sliding_attention": {**YARN, "rope_theta": 500.0},
        },
    },
    "another theta where windows are": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 5,
        "rope_local_base_freq": 100.0,
    },
    "scores scaled without rope": {
        "model_type": "granitemoehybrid",
        "attention_multiplier": 0.3,
        "layer_types": ["full_attention"] * 3,
        "num_local_experts": 0,
        "position_embedding_type": "nope",
        "mamba_n_heads": 4,
    },
    # The longer of `compare`'s two documents
    "LongRoPE of a document as long as the original length": {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 40,
        "pad_token_id": 0,
    },
    "the original length in two places": {
        "model_type": "llama",
        "rope_scaling": LLAMA3,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("what", COMPUTED)
def test_what_few_files_say_is_computed_as_transformers_does(tmp_path: Path, what: str) -> None:
    assert compare(tmp_path / "model", {**SHAPE, **COMPUTED[what]}) == "taken"


def test_a_dozen_configurations_compute_what_transformers_does(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, range(14))
    assert counts["taken"] >= 4 and counts["refused"] >= 2, counts


FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, (0, 4, 0)),
        ({"model_type": "qwen3_moe", **FEW_EXPERTS}, (4, 4, 4)),
    ],
)
def test_windows_that_are_switched_on_are_where_transformers_has_them(
    tmp_path: Path, change: dict[str, Any], windows: tuple[int, ...]
) -> None:
    """`max_window_layers` has no say there."""
    said = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 28}
    config = {**SHAPE, **change, **said, "pad_token_id": 0}
    assert parse_model_config(config).windows == windows
    assert compare(tmp_path / "model", config) == "taken"


def test_yarn_takes_as_many_positions_as_its_factor_says() -> None:
    said = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 512}
    assert parse_model_config({"model_type": "qwen2", **SHAPE, **said}).max_position == 2048


@pytest.mark.slow
def test_hundreds_of_configurations_compute_what_transformers_does(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, range(1000, 1400))
    assert counts["taken"] >= 80 and counts["refused"] >= 50, counts
