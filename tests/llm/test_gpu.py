"""Training and sampling from Python on a GPU: recorded graphs and runs ahead change no answer, and
the memory comes back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import retool
from retool import LLM, SamplingParams
from tests.llm.test_llm import TEXTS, folder
from tests.ranks import need_gpus
from tests.sft.conftest import work
from tests.sft.test_api import tune

__all__ = ["folder", "work"]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_answers_in_pieces_are_those_at_once(folder: Path) -> None:
    """A second engine in the process finds the memory that the first one found, but for the work
    space that cuBLAS keeps from its first product on.
    """
    need_gpus(1)
    after: list[int] = []
    for _ in range(2):
        answer_in_pieces(folder)
        torch.cuda.empty_cache()
        after.append(torch.cuda.memory_allocated())
    assert after[1] - after[0] < 1 << 20


def answer_in_pieces(folder: Path) -> None:
    """A stop text that never comes cuts the answer into pieces, as a stream does."""
    with LLM(folder, gpu_memory_utilization=0.1) as llm:
        params = SamplingParams(max_tokens=60, seed=3, ignore_eos=True, n=2, logprobs=2)
        whole = llm.generate(TEXTS, params)
        cut = llm.generate(TEXTS, replace(params, stop="never to be found"))
        *_, streamed = llm.stream(TEXTS[0], params)
        for a, b in zip(whole, cut, strict=True):
            assert [x.token_ids for x in a.outputs] == [x.token_ids for x in b.outputs]
        assert [x.token_ids for x in streamed.outputs] == [x.token_ids for x in whole[0].outputs]
        for entry in whole[0].outputs[0].logprobs or ():
            (sampled, *_) = entry.values()
            likeliest = max(other.logprob for other in entry.values())
            assert sampled.logprob <= likeliest + 1e-6
            assert sampled.rank is not None and (
                sampled.rank > 1 or sampled.logprob > likeliest - 0.1
            )


def test_runs_give_their_memory_back(work: Path, tmp_path: Path) -> None:
    """A second run in the process finds what the first one found, but for what libraries keep."""
    need_gpus(1)
    after: list[int] = []
    for number in range(2):
        result = tune(work, tmp_path / f"run{number}", device="auto")
        assert isinstance(result, retool.Result) and result.finished
        after.append(torch.cuda.memory_allocated())
    assert after[1] - after[0] < 1 << 20
