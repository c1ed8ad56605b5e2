"""The decoders against transformers: logits and all gradients, packed and one by one, and a real
model's published text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.batch import Sample, pack
from retool.checkpoint.hf.export import export_weights
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.checkpoint.hf.side_files import copy_side_files
from retool.model.build import ModelOptions
from retool.model.catalogue.families import parse_model_config, read_model_config
from retool.parallel.mesh import make_mesh
from tests.model.tiny import FAMILIES, SHAPE, make, stored_gradients
from tests.real_data import real


def sample(rng: np.random.Generator, n: int, vocab: int = SHAPE["vocab_size"]) -> Sample:
    return Sample(rng.integers(0, vocab, n).astype(np.int32), np.ones(n, bool))


def logits(hidden: torch.Tensor, weight: torch.Tensor, cap: float = 0.0) -> torch.Tensor:
    plain = hidden @ weight.t()
    return cap * torch.tanh(plain / cap) if cap else plain


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm().detach() / b.norm().detach())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_logits_and_gradients_equal_transformers(
    tmp_path: Path, family: str, recompute: str
) -> None:
    reference = make(tmp_path, family)
    sharded = load_pretrained(tmp_path, make_mesh(), ModelOptions(recompute=recompute))
    rng = np.random.default_rng(0)
    samples = [sample(rng, n) for n in (17, 1, 40, 9)]
    direction = torch.from_numpy(rng.normal(size=(67, SHAPE["vocab_size"])).astype(np.float32))
    ours = sharded(pack(samples), logits)
    (ours * direction).sum().backward()
    rows = [reference(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0] for s in samples]
    theirs = torch.cat(rows)
    (theirs * direction).sum().backward()
    assert relative(ours, theirs) < 1e-5
    wanted = stored_gradients(reference)
    checked = 0
    for unit, member in sharded.layout.members:
        start = unit.start + member.offset
        grad = sharded.grad[start : start + member.numel].view(member.shape)
        assert relative(grad, wanted[member.name]) < 1e-5, member.name
        checked += 1
    assert checked == len(wanted)
    assert [m.name for _, m in sharded.layout.members] == list(wanted), "parameters() order"


@pytest.mark.parametrize(
    ("plain", "scaled"),
    [
        ("llama", "llama3"),
        ("qwen2", "qwen2-yarn"),
        ("llama", "llama-dynamic"),
        ("phi3", "phi4-mini"),
        ("llama", "mistral-window"),
        ("qwen2", "qwen2-window"),
        ("olmo2", "olmo3"),
    ],
)
def test_scaled_rope_and_windows_change_the_result(tmp_path: Path, plain: str, scaled: str) -> None:
    """The model must differ from the plain one, or the parity above proves nothing about it."""
    for family in (plain, scaled):
        make(tmp_path / family, family, tie_word_embeddings=False)
    batch = pack([sample(np.random.default_rng(0), 60)])
    with torch.no_grad():
        without, with_it = (
            load_pretrained(tmp_path / f, make_mesh())(batch, logits) for f in (plain, scaled)
        )
    assert relative(with_it, without) > 1e-3


@pytest.mark.parametrize("family", ["phi4-mini", "ministral", "olmo3", "gemma2", "gemma3"])
def test_transformers_loads_what_is_exported(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    exported = tmp_path / "exported"
    reference = make(folder, family)
    mesh = make_mesh()
    sharded = load_pretrained(folder, mesh)
    copy_side_files(folder, exported, torch.float32)
    rows = [
        sharded.master[unit.start + member.offset :][: member.numel]
        for unit in sharded.layout.units
        for member in unit.members
    ]
    export_weights(sharded.layout, mesh, torch.cat(rows), exported, None, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reference(ids).logits)


def test_gemmas_embedding_is_scaled_as_transformers_does_it_in_bf16(tmp_path: Path) -> None:
    """The scale is rounded before it multiplies: 6.9282 is 6.9375 then."""
    reference = make(tmp_path, "gemma3").bfloat16()
    options = ModelOptions(param_dtype=torch.bfloat16)
    decoder = load_pretrained(tmp_path, make_mesh(), options).module
    tokens = torch.arange(SHAPE["vocab_size"])
    with torch.no_grad():
        wanted = reference.get_input_embeddings()(tokens)
        assert torch.equal(decoder.embedded(tokens), wanted)


def test_packed_equals_one_by_one(tmp_path: Path) -> None:
    make(tmp_path, "qwen2")
    f64 = torch.float64
    sharded = load_pretrained(tmp_path, make_mesh(), ModelOptions(f64, f64, f64))
    rng = np.random.default_rng(1)
    samples = [sample(rng, n) for n in (33, 5, 21)]
    with torch.no_grad():
        packed = sharded(pack(samples, multiple=8), logits)[: sum(map(len, samples))]
        alone = torch.cat([sharded(pack([s]), logits) for s in samples])
    assert packed.dtype == f64
    assert relative(packed, alone) < 1e-14


def test_stories260k_tells_its_published_story() -> None:
    folder = real("stories260k")
    sharded = load_pretrained(folder, make_mesh())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time").input_ids
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(120):
            tokens = np.array(ids, np.int32)
            ids.append(int(sharded(pack([Sample(tokens, tokens >= 0)]), logits)[-1].argmax()))
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=120, do_sample=False)[
            0
        ].tolist()
    assert ids == expected
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )


def test_both_rope_spellings_are_read(tmp_path: Path) -> None:
    make(tmp_path, "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 123456.0})
    assert read_model_config(tmp_path).rope_theta == 123456.0
    old = {
        "model_type": "llama",
        **SHAPE,
        "rope_theta": 5e5,
        "rope_scaling": {
            "type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        },
    }
    parsed = parse_model_config(old)
    assert (
        parsed.rope_theta == 5e5
        and parsed.rope_scaling is not None
        and parsed.rope_scaling.factor == 8
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional'"),
        (
            {"use_sliding_window": True, "max_window_layers": 2},
            "use_sliding_window=True",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model_config({"model_type": "llama", **SHAPE, **change})


@pytest.mark.slow
def test_compiled_pieces_equal_eager_ones(tmp_path: Path) -> None:
    """One graph for every layer and length, on every Python that we support."""
    make(tmp_path, "qwen2")
    rng = np.random.default_rng(3)
    eager, compiled = (
        load_pretrained(tmp_path, make_mesh(), ModelOptions(use_compile=flag))
        for flag in (False, True)
    )
    torch._dynamo.utils.counters.clear()
    for lengths in ((9, 30), (5, 17, 3), (64,)):
        batch = pack([sample(rng, n) for n in lengths])
        for model in (eager, compiled):
            model.zero_grad()
            model(batch, logits).square().sum().backward()
        assert relative(compiled.grad, eager.grad) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, (
        "before and after, each for one and for any length"
    )
