"""The engine's residual stream: in fp32 above bf16 weights, untouched where the weights are as precise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from retool.model.build import ModelOptions
from retool.model.decoder import Block, rms_norm
from retool.rl.engine import SamplingParams
from retool.rl.engine.weights import blocks
from tests.model.tiny import make
from tests.rl.engine.models import engine_of, forced, load, prompts, run

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def test_the_sampler_is_nearer_to_exact_log_probabilities_than_a_bf16_residual_stream_is(tmp_path: Path) -> None:
    """The training forward, whose residual stream has the weights' dtype, is what to be better than. Exact: fp32, the same weights."""
    make(tmp_path, "llama", num_hidden_layers=32, initializer_range=0.05)
    model, exact = load(tmp_path, ModelOptions(param_dtype=BF16)), load(tmp_path)
    exact.master.copy_(exact.master.to(BF16))
    engine, ids, errors = engine_of(tmp_path, model), prompts(8, 20, 131), []
    for i, prompt in enumerate(ids):
        engine.start(i, prompt, SamplingParams(max_tokens=30, seed=(i,)))
    done = run(engine)
    for i, prompt in enumerate(ids):
        truth, rounded = (forced(m, [*prompt, *done[i].tokens])[len(prompt) - 1 :] for m in (exact, model))
        errors.append(torch.stack([torch.tensor(done[i].logp) - truth, rounded - truth]).abs())
    sampler, trainer = torch.cat(errors, 1).mean(1)
    assert 1e-4 < sampler < 0.75 * trainer


@pytest.mark.parametrize(("weights", "stream"), [(BF16, FP32), (FP32, FP32), (FP64, FP64)])
def test_weights_of_fp32_and_more_meet_the_very_embedding(tmp_path: Path, weights: torch.dtype, stream: torch.dtype) -> None:
    make(tmp_path, "qwen3")
    master = torch.promote_types(weights, FP32)
    engine = engine_of(tmp_path, load(tmp_path, ModelOptions(param_dtype=weights, master_dtype=master, reduce_dtype=master)))
    decoder, embedded, seen = engine.weights.decoder, [], list[Tensor]()
    decoder.embed.register_forward_hook(lambda _module, _inputs, out: embedded.append(out))

    def before(block: Block, x_tD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen.append(x_tD)
        return block.before(x_tD, cos, sin)

    for block in blocks(decoder):
        block.before_piece = before
    engine.start("a", [1, 2, 3], SamplingParams(max_tokens=1))
    run(engine)
    assert {x.dtype for x in seen} == {stream}
    assert (embedded[0] is seen[0]) == (weights != BF16)


def test_a_norm_has_the_weights_dtype_and_there_the_same_bits_whatever_that_of_x() -> None:
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 48)))
    for dtype in (BF16, FP32, FP64):
        x, weight = drawn[:7].to(dtype), drawn[7].to(dtype)
        wide = x.to(torch.promote_types(dtype, FP32))
        want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        assert torch.equal(rms_norm(x, weight, 1e-6), want)
        assert torch.equal(rms_norm(wide, weight, 1e-6), want)
