"""Tiny models, engines over them and a loop that runs an engine dry: what the engine tests stand
on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone
from retool.engine.backend import RolloutEngine
from retool.engine.memory import page_bytes
from retool.model.build import ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.model.logprobs import logprobs
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh

CPU = torch.device("cpu")


def load(folder: Path, options: ModelOptions | None = None) -> Sharded:
    return load_pretrained(folder, make_mesh(device="cpu"), options)


def engine_of(folder: Path, model: Sharded, pages: int | None = None, **options: Any) -> Engine:
    """An engine with a cache of `pages` that can be used."""
    options = {"max_num_seqs": 8, "page_size": 8, **options}
    c = read_model_config(folder)
    if pages is not None:
        options["kv_bytes"] = (pages + 1) * page_bytes(
            (c.layers, options["page_size"], c.kv_heads, c.head_dim), torch.float32
        )
    engine = Engine(c, CPU, EngineOptions(**options))
    engine.sync(model)
    return engine


def run(engine: Engine, most: int = 5000) -> dict[Hashable, TurnDone]:
    """Step until idle; the finished turns by key. A livelock fails."""
    done: dict[Hashable, TurnDone] = {}
    for _ in range(most):
        if engine.idle():
            return done
        for turn in engine.step():
            assert turn.key not in done, f"{turn.key} was reported twice"
            done[turn.key] = turn
    raise AssertionError(f"not idle after {most} steps: {engine.stats}")


def prompts(count: int, longest: int, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, vocab, int(rng.integers(1, longest + 1))).tolist() for _ in range(count)
    ]


def forced(model: Sharded, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p of ids[1:] through the training forward."""
    tokens = np.array(ids, np.int32)
    batch = pack([Sample(tokens, np.ones(len(ids), bool))]).to(model.mesh.device)

    def score(hidden: torch.Tensor, weight: torch.Tensor, cap: float = 0.0) -> torch.Tensor:
        return logprobs(hidden, weight, batch.labels, temperature, cap=cap)[0]

    with torch.no_grad():
        return model(batch, score)[:-1]


def two_turns(
    engine: RolloutEngine, asked: Mapping[Any, list[int]], params: SamplingParams
) -> dict[Any, list[TurnDone]]:
    """Two turns for each prompt, with two given tokens between them."""
    turns: dict[Any, list[TurnDone]] = {key: [] for key in asked}
    for key, ids in asked.items():
        engine.start(key, ids, params, group=key)
    while not engine.idle():
        for turn in engine.step():
            turns[turn.key].append(turn)
            if len(turns[turn.key]) == 1:
                engine.extend(turn.key, [3, 4], params)
            else:
                engine.drop(turn.key)
    return turns


def tokens_of(turns: Mapping[Any, list[TurnDone]]) -> list[list[int]]:
    return [turn.tokens for each in turns.values() for turn in each]


def leaked(engine: Engine) -> int:
    """Pages that nobody refers to and that aren't free, or the other way round."""
    pool = engine._ready().pool
    assert sorted(pool.free) == sorted(p for p, n in enumerate(pool.counts) if n == 0 and p > 0)
    return pool.capacity - len(pool.free)
