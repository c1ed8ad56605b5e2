"""Compiled graphs of a run: trainer, reference and engine share them, and there are few, whatever
the lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from retool.batch import Sample, pack
from retool.engine import Engine, SamplingParams
from retool.model.build import ModelOptions
from retool.model.compiling.calls import Compiled
from retool.model.logprobs import logprobs
from retool.parallel.fsdp import Sharded
from tests.engine.models import engine_of, forced, leaked, load, prompts, run
from tests.model.tiny import make


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(model: Sharded, lengths: tuple[int, ...]) -> None:
    batch = pack([Sample(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in lengths])
    model.zero_grad()
    model(batch, lambda hidden, weight: logprobs(hidden, weight, batch.labels)[0]).sum().backward()


def generate(engine: Engine, tag: int, lengths: list[int]) -> None:
    for i, prompt in enumerate(prompts(len(lengths), 1, 100, tag)):
        engine.start(
            (tag, i),
            prompt * lengths[i],
            SamplingParams(max_tokens=2 + 3 * i, seed=(i,), top_p=0.9 if tag % 2 else 1.0),
        )
    for key in run(engine):
        engine.drop(key)
    assert leaked(engine) == 0


def test_what_reaches_over_two_blocks_is_no_blocks_compiled_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled functions of a block are called with tensors, and return one: they look at both."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    call = Compiled.__call__
    calls = []

    def looked_at(function: Compiled, block: nn.Module, *arguments: Any) -> torch.Tensor:
        assert not any(isinstance(argument, nn.Module) for argument in arguments)
        out = call(function, block, *arguments)
        assert isinstance(out, torch.Tensor)
        calls.append(out)
        return out

    monkeypatch.setattr(Compiled, "__call__", looked_at)
    make(tmp_path, "qwen2")
    model = load(tmp_path)
    generate(engine_of(tmp_path, model, use_compile=True), 1, [5, 1, 13])
    assert calls, "the last block's `after` is one"


@pytest.mark.slow
def test_any_length_in_any_role_meets_the_same_few_graphs(tmp_path: Path) -> None:
    make(tmp_path, "qwen2")
    model, reference = (load(tmp_path, ModelOptions(use_compile=True)) for _ in range(2))
    engines = [
        engine_of(tmp_path, model, use_compile=True, max_num_seqs=n, max_batch_tokens=24)
        for n in (8, 5)
    ]
    before = graphs()
    train(model, (9, 30))
    for some in (model, reference):
        forced(some, list(range(40)))
        forced(some, [7])
    first = graphs() - before
    assert first <= 6, (
        "before and after: for training, for any length without gradients, for length 1 without"
    )
    for round_ in range(3):
        train(model, (5, 17 + round_, 3))
        forced(reference, list(range(3 + 20 * round_)))
        for number, engine in enumerate(engines):
            engine.sync(model)
            # chunks, decode steps, both; down to one row
            generate(engine, 10 * round_ + number, [5, 1, 13, 2, 50 + round_, 30])
            generate(engine, 10 * round_ + number + 5, [1])
    engines[0].release()
    engines[0].sync(model)
    generate(engines[0], 99, [4, 1])
    assert graphs() - before == first + 6, (
        "three pieces of the engine's own, each for any length and for length 1"
    )
