"""Rope that goes by a document's length: what padding, packing and the engine make of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retool.batch import pack, pack_apart
from retool.engine import Engine, EngineOptions, SamplingParams
from retool.model.catalogue.families import parse_model_config, read_model_config
from retool.model.rope import document_lengths
from retool.preflight.world import World
from retool.rl.preflight.checks import _engine_faults
from retool.sft.preflight import _padding_faults
from tests.engine.models import CPU, engine_of, load, run
from tests.model.test_decoder import sample
from tests.model.tiny import DYNAMIC, LONGROPE, SHAPE, make

LIMIT = 32  # the tiny models' original length


def test_a_tokens_document_is_as_long_on_every_rank() -> None:
    rng = np.random.default_rng(0)
    batch = pack([sample(rng, n) for n in (3, 1, 4)])
    assert document_lengths(batch, 0).tolist() == [3, 3, 3, 1, 4, 4, 4, 4]
    parts = [document_lengths(batch.slice(rank, 4), rank) for rank in range(4)]
    assert torch.cat(parts).tolist() == document_lengths(batch, 0).tolist()
    shares = [[sample(rng, 3)], [sample(rng, 1), sample(rng, 2)]]
    alone = [document_lengths(pack_apart(shares).slice(rank, 2), rank) for rank in range(2)]
    assert torch.cat(alone).tolist() == [3, 3, 3, 1, 2, 2]


@pytest.mark.parametrize(
    ("rope", "steady", "most"),
    [
        (LONGROPE, LIMIT, 512),
        ({**LONGROPE, "long_factor": LONGROPE["short_factor"]}, 0, 512),
        ({"rope_type": "default"}, 0, 512),
    ],
)
def test_how_long_a_rope_stays_the_same(rope: dict[str, object], steady: int, most: int) -> None:
    field = {"original_max_position_embeddings": LIMIT}
    config = parse_model_config(
        {"model_type": "phi3", **SHAPE, **field, "rope_scaling": dict(rope)}
    )
    assert config.steady_length == steady and config.max_position == most


def test_dynamic_ntk_is_steady_up_to_its_positions() -> None:
    config = parse_model_config({"model_type": "llama", **SHAPE, "rope_scaling": DYNAMIC})
    assert config.steady_length == SHAPE["max_position_embeddings"]


def test_the_engine_ends_where_keys_would_turn_otherwise(tmp_path: Path) -> None:
    make(tmp_path, "phi4-mini")
    config = read_model_config(tmp_path)
    with pytest.raises(ValueError, match="max_length=33: 33 tokens are more than 32"):
        Engine(config, CPU, EngineOptions(max_length=LIMIT + 1))
    engine = engine_of(tmp_path, load(tmp_path))
    engine.start("long", list(range(20)), SamplingParams(max_tokens=40, temperature=0))
    turn = run(engine)["long"]
    assert len(turn.tokens) == LIMIT - 20 and turn.reason == "capacity"


def test_runs_whose_lengths_would_change_the_rope_are_refused_before_they_start() -> None:
    """Sampling beyond the original length, and padding beyond it: as preflight says it."""
    model = parse_model_config({"model_type": "llama", **SHAPE, "rope_scaling": DYNAMIC})
    data = SimpleNamespace(max_prompt_length=400, max_response_length=200, max_length=600)
    rollout = SimpleNamespace(tensor_model_parallel_size=1, enable_rollout_routing_replay=False)
    config = SimpleNamespace(
        data=data, actor_rollout_ref=SimpleNamespace(rollout=rollout), use_remove_padding=False
    )
    report: Any = SimpleNamespace(config=config, model=model, world=World(1, 1, 1))
    (sampled,) = _engine_faults(report)
    assert sampled.where == "data.max_response_length" and "600 tokens" in sampled.problem
    (padded,) = _padding_faults(report)
    assert padded.where == "use_remove_padding=false" and "beyond 512" in padded.problem
    report.model = parse_model_config({"model_type": "llama", **SHAPE})
    assert [*_engine_faults(report), *_padding_faults(report)] == []
