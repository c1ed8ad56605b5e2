"""Engines beside a sharded trainer, and one engine over two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams
from retool.model.catalogue.families import read_model_config
from retool.parallel.mesh import make_mesh
from tests.engine.models import CPU, engine_of, leaked, load, prompts, run
from tests.model.tiny import make
from tests.ranks import run_ranks

PROMPTS = prompts(6, 30, 131)


def start(engine: Engine) -> None:
    for i in range(6):
        engine.start(
            i,
            PROMPTS[i // 2],
            SamplingParams(
                max_tokens=4 + i, temperature=0.8, top_p=0.9 if i % 3 else 1.0, seed=(i,)
            ),
            group=i // 2,
        )


def turns(engine: Engine) -> list[tuple[list[int], list[float]]]:
    start(engine)
    done = run(engine)
    for i in range(6):
        engine.drop(i)
    assert leaked(engine) == 0
    return [(done[i].tokens, done[i].logp) for i in range(6)]


def data_parallel(folder: str) -> Any:
    """Each rank samples by itself from weights that it has half of."""
    model = load_pretrained(folder, make_mesh(device="cpu"))
    engine = Engine(read_model_config(folder), CPU, EngineOptions(max_num_seqs=8, page_size=8))
    engine.sync(model)
    values = {
        s.name: engine.weights.decoder.get_parameter(s.name).detach().numpy()
        for u in model.layout.units
        for s in u.slots
    }
    return turns(engine), values


def test_weights_gathered_from_two_ranks_are_the_whole_ones(tmp_path: Path) -> None:
    for family in ("qwen2", "llama"):
        make(tmp_path / family, family)
        alone = engine_of(tmp_path / family, load(tmp_path / family))
        want = turns(alone)
        for found, values in run_ranks(data_parallel, 2, str(tmp_path / family)):
            assert found == want
            for name, value in values.items():
                assert (
                    value == alone.weights.decoder.get_parameter(name).detach().numpy()
                ).all(), name


def tensor_parallel(folder: str, options: dict[str, Any]) -> Any:
    mesh = make_mesh(device="cpu")
    model = load_pretrained(folder, mesh)
    engine = Engine(
        read_model_config(folder),
        CPU,
        EngineOptions(**{"max_num_seqs": 5, "page_size": 8, **options}),
        mesh.world_group,
    )
    engine.sync(model)
    found = None
    if dist.get_rank() == 0:
        found = turns(engine)
        engine.end()
    else:
        engine.follow()
    engine.sync(model)  # everyone is back
    return found, engine._worker.model.cache.data.shape[3]


def same_as_alone(folder: Path, ranks: int, way: dict[str, Any], heads: int) -> None:
    want = turns(engine_of(folder, load(folder)))
    results = run_ranks(tensor_parallel, ranks, str(folder), way)
    for (tokens, logp), (wanted, logp_wanted) in zip(results[0][0], want, strict=True):
        assert tokens == wanted
        assert max(abs(a - b) for a, b in zip(logp, logp_wanted, strict=True)) < 3e-5
    assert [r[1] for r in results] == [heads] * ranks


def test_heads_split_over_two_ranks_sample_the_same(tmp_path: Path) -> None:
    """A rank caches one key and one value head of the two."""
    make(tmp_path, "qwen2")
    same_as_alone(tmp_path, 2, {"run_ahead": True}, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [{}, {"deterministic": True, "run_ahead": True}, {"max_batch_tokens": 7}]
)
def test_heads_split_over_two_ranks_any_way(tmp_path: Path, way: dict[str, Any]) -> None:
    make(tmp_path, "qwen2")
    same_as_alone(tmp_path, 2, way, 2)


@pytest.mark.slow
def test_heads_that_do_not_split_evenly(tmp_path: Path) -> None:
    """6 query heads on 4 ranks: 2, 2, 1, 1 of them; the second rank's two read different kv heads."""
    make(tmp_path, "llama")
    want = turns(engine_of(tmp_path, load(tmp_path)))
    results = run_ranks(tensor_parallel, 4, str(tmp_path), {"max_num_seqs": 8})
    assert [tokens for tokens, _ in results[0][0]] == [tokens for tokens, _ in want]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ministral", "gemma3"])
def test_windows_hold_where_heads_are_split(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    same_as_alone(tmp_path, 2, {"run_ahead": True}, 2)
