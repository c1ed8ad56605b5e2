"""The engine tells which experts computed each token, whatever the scheduler does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retool.batch import Sample, pack
from retool.engine import SamplingParams
from retool.model.decoder import Decoder
from retool.parallel.fsdp import Sharded
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.types import Prompt, Stop
from tests.engine.models import engine_of, load, prompts
from tests.model.tiny import make

LAYERS = 3
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks of 8": {"max_batch_tokens": 8},
    "preempting": {"page_size": 4, "pages": 24},
    "running ahead": {"run_ahead": True},
}


class Choices:
    """A watch that keeps every layer's choice."""

    def __init__(self) -> None:
        self.of: dict[int, np.ndarray] = {}

    def seen(
        self,
        layer: int,
        probs: torch.Tensor,
        experts: torch.Tensor,
        real: torch.Tensor | None,
    ) -> torch.Tensor:
        self.of[layer] = experts.numpy()
        return probs


def by_training(model: Sharded, tokens: list[int]) -> np.ndarray:
    """[n, layers, k]: the choices of the training decoder."""
    choices = Choices()
    module = model.module
    assert isinstance(module, Decoder)
    for block in module.layers:
        block.execution = replace(block.execution, watch=choices)
    ids = np.array(tokens, np.int32)
    with torch.no_grad():
        model(pack([Sample(ids, ids >= 0)]), lambda hidden, weight: hidden)
    return np.stack([choices.of[layer] for layer in range(LAYERS)], 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    make(path, "qwen3_moe")
    return path


@pytest.mark.parametrize("way", WAYS)
def test_the_experts_of_every_token_are_told(folder: Path, way: str) -> None:
    """Two turns of five prompts with two samples each, against the training decoder's choices."""
    model = load(folder)
    engine = engine_of(folder, model, return_experts=True, **WAYS[way])
    params = SamplingParams(max_tokens=9)
    keys = [(i, sample) for i in range(5) for sample in range(2)]
    begun = prompts(5, 30, 131)
    tokens: dict[Any, list[int]] = {}
    told: dict[Any, list[np.ndarray]] = {key: [] for key in keys}
    for i, sample in keys:
        tokens[i, sample] = list(begun[i])
        seeded = replace(params, seed=(i, sample))
        engine.start((i, sample), begun[i], seeded, group=i)
    tool_turn = [5, 6, 7]
    while not engine.idle():
        for turn in engine.step():
            assert turn.experts is not None
            tokens[turn.key] += turn.tokens
            told[turn.key].append(turn.experts)
            if len(told[turn.key]) == 1:
                tokens[turn.key] += tool_turn
                engine.extend(turn.key, tool_turn, params)
    assert (engine.stats.preempted + engine.stats.evicted > 0) == (way == "preempting")
    for key in keys:
        assert [len(part) for part in told[key]] == [len(begun[key[0]]) + 8, 1 + 3 + 8]
        found = np.concatenate(told[key])
        assert found.dtype == np.int8
        wanted = by_training(model, tokens[key])[:-1]
        # Equal probabilities aside, the order of a token's experts is that of their probabilities
        np.testing.assert_array_equal(found, wanted)


def test_who_has_no_experts_cannot_tell(tmp_path: Path) -> None:
    make(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="a qwen2 model has no experts that could be told"):
        engine_of(tmp_path, load(tmp_path), return_experts=True)


def test_a_trajectory_has_the_experts_of_all_its_tokens() -> None:
    """The last token of a turn is computed with the next one; after the last turn nobody does."""
    prompt = Prompt(0, [], None, np.arange(3, dtype=np.int32), "", "")
    episode = Episode.begin(prompt)
    first = np.full((4, 1, 2), 1, np.int8)
    second = np.full((4, 1, 2), 2, np.int8)
    episode.add_turn(Sampled([7, 8], [0.0, 0.0], [0.0, 0.0], "stop", first), "")
    episode.add_tool_turn([], [9, 9])
    episode.add_turn(Sampled([7, 8], [0.0, 0.0], [0.0, 0.0], "stop", second), "")
    trajectory = episode.finish(Stop.NO_CALL, 0)
    assert trajectory.experts is not None
    assert trajectory.experts[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, -1]
