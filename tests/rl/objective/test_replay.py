"""Router replay: what was sampled through some experts is trained through the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.packing import Budget
from retool.engine import SamplingParams
from retool.model.build import ModelOptions
from retool.parallel.mesh import make_mesh
from retool.rl.objective.batching import Row, make_batch
from retool.rl.objective.policy import policy_logprobs
from tests.engine.models import engine_of, prompts, run
from tests.model.tiny import make
from tests.ranks import run_ranks

BUDGET = Budget(micro_batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    make(path, "qwen3_moe")
    return path


def sampled(folder: Path) -> tuple[list[Sample], list[np.ndarray]]:
    """What an engine sampled, with its experts, and its log-probabilities of that."""
    model = load_pretrained(folder, make_mesh(device="cpu"))
    engine = engine_of(folder, model, return_experts=True)
    begun = prompts(5, 12, 131)
    for i, ids in enumerate(begun):
        engine.start(i, ids, SamplingParams(max_tokens=10, seed=(i,)))
    samples = []
    logps = []
    done = run(engine)
    for i, prompt in enumerate(begun):
        turn = done[i]
        assert turn.experts is not None
        ids = np.array(prompt + turn.tokens, np.int32)
        mask = np.arange(len(ids)) >= len(prompt)
        experts = np.pad(turn.experts, ((0, 1), (0, 0), (0, 0)), constant_values=-1)
        samples.append(Sample(ids, mask, experts))
        logps.append(np.concatenate([np.zeros(len(prompt)), turn.logp]))
    return samples, logps


def without(samples: list[Sample]) -> list[Sample]:
    return [Sample(sample.tokens, sample.mask) for sample in samples]


def trained(folder: str, samples: list[Sample], sp: int, moved: float = 0.0) -> list[np.ndarray]:
    """Log-probabilities by a trainer whose routers were `moved`."""
    model = load_pretrained(folder, make_mesh(sp=sp), ModelOptions(recompute="full"))
    if moved:
        generator = torch.Generator().manual_seed(0)
        for unit, member in model.layout.members:
            if member.name.endswith("mlp.gate.weight"):
                start = unit.start + member.offset
                noise = torch.randn(member.numel, generator=generator)
                model.master[start : start + member.numel] += moved * noise
        model.refresh()
    return policy_logprobs(model, samples, 1.0, BUDGET)[0]


def distance(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


def test_replay_changes_nothing_where_both_choose_alike(folder: Path) -> None:
    samples, logps = sampled(folder)
    assert distance(trained(str(folder), samples, 1), logps) < 1e-4
    assert distance(trained(str(folder), without(samples), 1), logps) < 1e-4


def test_replay_brings_a_trainer_with_another_router_nearer(folder: Path) -> None:
    """Only weights of experts differ then, not who computes."""
    samples, logps = sampled(folder)
    replayed = distance(trained(str(folder), samples, 1, 0.02), logps)
    rerouted = distance(trained(str(folder), without(samples), 1, 0.02), logps)
    assert 0 < replayed < rerouted / 2


@pytest.mark.slow
@pytest.mark.parametrize("sp", [1, 2])
def test_two_ranks_replay_alike(folder: Path, sp: int) -> None:
    samples, _ = sampled(folder)
    # Other experts than the router's: the last ones first
    given = []
    for each in samples:
        assert each.experts is not None
        others = np.where(each.experts < 0, each.experts, 7 - each.experts)
        given.append(Sample(each.tokens, each.mask, others))
    alone = trained(str(folder), given, 1)
    assert distance(alone, trained(str(folder), samples, 1)) > 0.1
    both = run_ranks(trained, 2, str(folder), given, sp)
    for found in both:
        assert distance(found, alone) < 1e-4


def test_experts_travel_with_their_tokens() -> None:
    """Through rows, packs with padding, and the slices of sequence-parallel ranks."""
    zeros = np.zeros(3)
    mask = np.array([False, True, True])
    experts = np.arange(6, dtype=np.int8).reshape(3, 1, 2)
    row = Row(np.arange(3, dtype=np.int32), mask, zeros, zeros, zeros, zeros, experts=experts)
    plain = Row(np.arange(3, dtype=np.int32), mask, zeros, zeros, zeros, zeros)
    batch = make_batch([plain, row], [zeros, zeros], multiple=4, token_share=0.25)
    parts = [batch.slice(rank, 4).pack.experts for rank in range(4)]
    whole = torch.cat([part for part in parts if part is not None])
    assert whole[:, 0].tolist() == [[-1, -1]] * 3 + [[0, 1], [2, 3], [4, 5]] + [[-1, -1]] * 2
    assert pack([Sample(row.tokens, row.mask)]).experts is None
