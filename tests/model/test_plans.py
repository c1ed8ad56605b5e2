"""cuDNN's plans that are made before the first step are those that the steps ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retool.batch import Sample, pack
from retool.data.loader import StepOrder, lengths_ahead, step_batch
from retool.data.packing import Budget, Packing
from retool.model import build
from retool.model.attention import cudnn, dispatch
from retool.model.build import ModelOptions, build_decoder
from retool.model.decoder import Decoder, plan_attention
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.parallel.ulysses import HeadPlan
from tests.model.decoders import decoder_config

SHORTEST = 16
Asked = set[tuple[str, torch.Size, tuple[int, ...], tuple[int, ...]]]


class Operators:
    """torch.ops.aten, with cuDNN's two noted and made up."""

    def __init__(self, aten: Any) -> None:
        self.aten = aten
        self.asked: Asked = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.aten, name)

    def _note(self, way: str, q: Tensor, k: Tensor) -> None:
        self.asked.add((way, q.shape, q.stride(), k.stride()))

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        self._note("forward", q, k)
        return torch.zeros_like(q.transpose(1, 2)).transpose(1, 2), torch.zeros(q.shape[:3])

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
    ) -> tuple[Tensor, ...]:
        self._note("backward", q, k)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    noted = Operators(torch.ops.aten)
    monkeypatch.setattr(cudnn, "CUDNN_SHORTEST", SHORTEST)
    monkeypatch.setattr(build, "choose_backend", lambda *_, **__: "cudnn")
    monkeypatch.setattr(dispatch, "_for_short", lambda *_: "reference")
    monkeypatch.setattr(torch.ops, "aten", noted)
    cudnn._runs.cache_clear()
    return noted


def decoder(**more: Any) -> Sharded:
    config = decoder_config(4, 2, vocab=31, hidden=16, ffn=24, layers=2, head_dim=4, **more)
    return build_decoder(config, make_mesh(), ModelOptions())


def test_steps_ask_for_no_other_plans(operators: Operators) -> None:
    model = decoder()
    lengths = (40, 3, 65, 17, 33, 15)
    assert plan_attention(model, lengths) == 4, "40, 33 → 34, 65 → 68, 17"
    planned = set(operators.asked)
    assert len(planned) == 2 * 4, "forward and backward"
    batch = pack([Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths])
    model(batch, lambda hidden, weight: (hidden @ weight.t()).sum()).backward()
    assert operators.asked == planned


def test_a_document_that_no_rank_computes_whole_is_planned_divided(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    assert isinstance(model.module, Decoder)
    plan = HeadPlan(sp=2, rank=0, heads=4, kv_heads=2, head_dim=4)
    model.module.execution = replace(model.module.execution, plan=plan)
    # q, k and v of a token have 16 elements on one of two ranks, 32 on one alone
    monkeypatch.setattr(cudnn, "INDEXABLE", 16 * 64)
    assert plan_attention(model, [20, 24, 40, 64], longest_whole=22) == 3, "64 tokens are too many"
    shapes = {(shape[1], shape[2]) for _, shape, *_ in operators.asked}
    assert shapes == {(2, 20), (2, 24), (2, 40), (4, 20)}, "(heads, tokens)"


def test_nothing_is_planned_where_cudnn_does_not_run(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan_attention(decoder(windows=(8, 8)), [40]) == 0
    monkeypatch.setattr(build, "choose_backend", lambda *_, **__: "reference")
    assert plan_attention(decoder(), [40]) == 0
    assert not operators.asked


class Documents:
    def __init__(self, lengths: range) -> None:
        self.lengths = np.array(lengths)
        self.trained = self.lengths - 1

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        n = int(self.lengths[index])
        return Sample(np.zeros(n, np.int32), np.ones(n, bool))


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 4), (3, 7), (0, 5), (3, 3)])
def test_lengths_ahead_are_those_of_the_steps(start: int, stop: int) -> None:
    dataset = Documents(
        range(10, 26)
    )  # five steps an epoch, and one sample that an epoch leaves out
    order = StepOrder(train_batch_size=3, seed=3)
    packing = Packing(Budget(2), 0, 1)
    found = set(lengths_ahead(dataset, order, start, stop).tolist())
    steps = [step_batch(step, dataset, order, packing) for step in range(start, stop)]
    taken = {int(dataset.lengths[i]) for step in steps for i in step.samples}
    assert found == (set(dataset.lengths.tolist()) if stop - start >= 5 else taken)
