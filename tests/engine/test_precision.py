"""The residual stream in fp32 above bf16 weights, in trainer and engine; untouched where the
weights are as precise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from retool.batch import Sample, pack
from retool.engine import SamplingParams
from retool.model.block import rms_norm
from retool.model.build import ModelOptions
from retool.model.families import qwen3
from retool.model.logprobs import logprobs
from retool.model.recompute import Recompute
from tests.engine.models import engine_of, forced, load, prompts, run
from tests.model.tiny import make

BF16 = torch.bfloat16
FP16 = torch.float16
FP32 = torch.float32
FP64 = torch.float64


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers that each add a little, as in trained models."""
    folder = tmp_path_factory.mktemp("deep")
    make(folder, "llama", num_hidden_layers=32, initializer_range=0.05)
    return folder


def errors(folder: Path, fp32_residual: bool, dtype: torch.dtype = BF16) -> Tensor:
    """Mean |Δ log p| of sampled tokens: sampler − exact, trainer − exact, sampler − trainer.

    Exact: fp32, the same weights.
    """
    model = load(folder, ModelOptions(param_dtype=dtype, fp32_residual=fp32_residual))
    exact = load(folder)
    exact.master.copy_(exact.master.to(dtype))
    engine = engine_of(folder, model)
    ids = prompts(8, 20, 131)
    found = []
    for i, prompt in enumerate(ids):
        engine.start(i, prompt, SamplingParams(max_tokens=30, seed=(i,)))
    done = run(engine)
    for i, prompt in enumerate(ids):
        truth, trainer = (
            forced(m, [*prompt, *done[i].tokens])[len(prompt) - 1 :] for m in (exact, model)
        )
        sampler = torch.tensor(done[i].logp)
        found.append(torch.stack([sampler - truth, trainer - truth, sampler - trainer]).abs())
    return torch.cat(found, 1).mean(1)


def test_log_probabilities_are_nearer_to_the_exact_ones_and_to_each_other(deep: Path) -> None:
    rounded = errors(deep, False)
    wide = errors(deep, True)
    assert (wide > 1e-4).all(), "bf16 weights have rounded products"
    assert (wide < 0.75 * rounded).all()


def test_fp16_is_nearer_still(deep: Path) -> None:
    """Three more bits of mantissa: 0.125."""
    assert (errors(deep, True, FP16) < 0.2 * errors(deep, True)).all()


@pytest.mark.parametrize(
    "recompute",
    [
        "none",
        "full",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("selective", "offload")),
    ],
)
def test_gradients_are_nearer_to_the_exact_ones_too(deep: Path, recompute: Recompute) -> None:
    tokens = np.random.default_rng(1).integers(0, 131, 300).astype(np.int32)
    batch = pack([Sample(tokens, tokens >= 0)])
    gradients = list[Tensor]()
    for dtype, wide in ((FP32, False), (BF16, False), (BF16, True)):
        model = load(deep, ModelOptions(param_dtype=dtype, fp32_residual=wide, recompute=recompute))
        if dtype == FP32:
            model.master.copy_(model.master.to(BF16))
        model(
            batch, lambda hidden, weight: logprobs(hidden, weight, batch.labels)[0]
        ).sum().backward()
        gradients.append(model.grad)
    exact, rounded, wide = gradients
    assert (wide - exact).norm() < 0.75 * (rounded - exact).norm()


@pytest.mark.parametrize(
    ("weights", "wide", "stream"),
    [(BF16, True, FP32), (BF16, False, BF16), (FP32, True, FP32), (FP64, True, FP64)],
)
def test_an_engine_does_as_the_trainer_and_precise_weights_meet_the_very_embedding(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: torch.dtype,
    wide: bool,
    stream: torch.dtype,
) -> None:
    make(tmp_path, "qwen3")
    master = torch.promote_types(weights, FP32)
    options = ModelOptions(
        param_dtype=weights, master_dtype=master, reduce_dtype=master, fp32_residual=wide
    )
    embedded = []
    seen = list[Tensor]()
    real = qwen3.Block.projected

    def projected(block: qwen3.Block, x_tD: Tensor) -> Tensor:
        seen.append(x_tD)
        return real(block, x_tD)

    monkeypatch.setattr(qwen3.Block, "projected", projected)
    engine = engine_of(tmp_path, load(tmp_path, options))
    engine.weights.decoder.embed.register_forward_hook(
        lambda _module, _inputs, out: embedded.append(out)
    )

    engine.start("a", [1, 2, 3], SamplingParams(max_tokens=1))
    run(engine)
    assert {x.dtype for x in seen} == {stream}
    assert (embedded[0] is seen[0]) == (stream == weights)


def test_a_norm_has_the_weights_dtype_and_there_the_same_bits_whatever_that_of_x() -> None:
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 48)))
    for dtype in (BF16, FP32, FP64):
        x = drawn[:7].to(dtype)
        weight = drawn[7].to(dtype)
        wide = x.to(torch.promote_types(dtype, FP32))
        want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        ) * weight
        assert torch.equal(rms_norm(x, weight, 1e-6), want)
        assert torch.equal(rms_norm(wide, weight, 1e-6), want)
