"""`rollout.name=hf`: transformers' continuous batching over a trainer's weights, against `generate`,
the trainer's log-probabilities, and what preflight says of models that it can't run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from retool.config import parse
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone, find_backend
from retool.engine.hf import batching
from retool.engine.hf.batching import flash_is_right
from retool.engine.hf.engine import HfEngine
from retool.engine.hf.trial import cant_batch
from retool.model.borrowed.read import borrow, read_any_config
from retool.model.catalogue.families import read_model_config
from retool.parallel.fsdp import Sharded
from retool.rl.config import RLConfig
from retool.rl.preflight.backends import backend_faults
from tests.engine.models import CPU, forced, load, tokens_of, two_turns
from tests.model.decoders import decoder_config
from tests.model.tiny import make
from tests.model.zoo import ARCHITECTURES, make_borrowed, tiny_config
from tests.ranks import run_ranks
from tests.rl.test_config import ARR, REQUIRED

PROMPTS: dict[Hashable, list[int]] = {"a": [5, 6, 7, 8], "b": [9, 10, 11], "c": [*range(20, 40)]}
GREEDY = SamplingParams(max_tokens=6, temperature=0)
LONGEST = 48
# That transformers' continuous batching can't run
UNABLE = ("gpt_neox", "nemotron", "opt", "stablelm")
# One of whose layers have a window; the others are slow
BY_DEFAULT = "cohere2"
KINDS = [
    pytest.param(name, marks=() if name == BY_DEFAULT else pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in UNABLE
]


def make_hf(folder: Path) -> HfEngine:
    options = EngineOptions(max_num_seqs=4, max_length=LONGEST, model_folder=folder)
    return HfEngine(read_any_config(folder), CPU, options)


def roll(engine: Any, params: SamplingParams) -> dict[Any, list[TurnDone]]:
    return two_turns(engine, PROMPTS, params)


def generated(reference: Any, ids: list[int], count: int) -> list[int]:
    prompt = torch.tensor([ids])
    out = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "glm"
    make_borrowed(path, "glm")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Sharded:
    return load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_log_probabilities(kind: str, tmp_path: Path) -> None:
    """Greedy turns are `generate`'s; log-probabilities at a temperature are the trainer's, and so
    are the weights: there is one copy of them.
    """
    reference: PreTrainedModel = make_borrowed(tmp_path, kind).eval()
    model = load(tmp_path)
    engine = make_hf(tmp_path)
    engine.sync(model)
    assert is_shared(engine, model)
    for key, (one, two) in roll(engine, GREEDY).items():
        ids = PROMPTS[key]
        assert one.tokens == generated(reference, ids, 6)
        assert two.tokens == generated(reference, [*ids, *one.tokens, 3, 4], 6)
        assert one.reason == "length" and one.logp_behaviour == [0.0] * 6
    engine.sync(model)
    warm = SamplingParams(max_tokens=6, temperature=0.7)
    for key, (one, two) in roll(engine, warm).items():
        whole = [*PROMPTS[key], *one.tokens, 3, 4, *two.tokens]
        truth = forced(model, whole, 0.7).tolist()
        begin = len(PROMPTS[key]) - 1
        assert one.logp == pytest.approx(truth[begin : begin + 6], abs=1e-4)
        assert two.logp == pytest.approx(truth[-6:], abs=1e-4)


def is_shared(engine: HfEngine, model: Sharded) -> bool:
    """Whether the sampler's weights are the trainer's memory."""
    assert engine.module is not None
    begin = model.compute.data_ptr()
    end = begin + model.compute.numel() * model.compute.itemsize
    places = [parameter.data_ptr() for parameter in engine.module.causal.parameters()]
    return not engine.module.gathered and all(begin <= place < end for place in places)


@pytest.mark.slow
def test_an_update_is_sampled_from(folder: Path, model: Sharded) -> None:
    """After the next `sync`; and after the memory was given back."""
    engine = make_hf(folder)
    engine.sync(model)
    assert is_shared(engine, model)
    first = tokens_of(roll(engine, GREEDY))
    before = model.compute.clone()
    model.compute.mul_(-1)
    engine.sync(model)
    assert tokens_of(roll(engine, GREEDY)) != first
    model.compute.copy_(before)
    engine.release()
    engine.sync(model)
    assert tokens_of(roll(engine, GREEDY)) == first


@pytest.mark.slow
def test_seeds_and_how_turns_end(folder: Path, model: Sharded) -> None:
    engine = make_hf(folder)
    draws = []
    for seed in (1, 1, 2):
        engine.sync(model)
        draws.append(tokens_of(roll(engine, SamplingParams(max_tokens=6, seed=(seed,)))))
    assert draws[0] == draws[1] != draws[2]
    engine.sync(model)
    tokens = roll(engine, GREEDY)["a"][0].tokens
    last = tokens[2]
    stops = SamplingParams(max_tokens=6, temperature=0, stop_ids=(last,))
    engine.start("stop", PROMPTS["a"], stops)
    engine.start("full", [7] * LONGEST, GREEDY)
    engine.start("gone", PROMPTS["b"], GREEDY)
    ended: dict[Hashable, TurnDone] = {turn.key: turn for turn in engine.step()}
    engine.drop("gone")
    while not engine.idle():
        ended |= {turn.key: turn for turn in engine.step()}
    assert set(ended) == {"stop", "full"}
    assert ended["full"].reason == "capacity" and not ended["full"].tokens
    assert ended["stop"].reason == "stop"
    assert ended["stop"].tokens == tokens[: tokens.index(last) + 1]
    engine.drop("full")
    engine.start("one", PROMPTS["a"], GREEDY)
    with pytest.raises(ValueError, match="alike"):
        engine.start("other", PROMPTS["b"], SamplingParams(max_tokens=2))


def gathered(folder: str) -> Any:
    """Each rank samples from weights that it has half of, and gives them back."""
    model = load(Path(folder))
    engine = make_hf(Path(folder))
    found = []
    for _ in range(2):
        engine.sync(model)
        assert engine.module is not None and engine.module.gathered
        found.append(tokens_of(roll(engine, GREEDY)))
        engine.release()
        assert not engine.module.gathered
        devices = {parameter.device.type for parameter in engine.module.causal.parameters()}
        assert devices == {"meta"}
    return found


@pytest.mark.slow
def test_ranks_gather_what_they_share(folder: Path, model: Sharded) -> None:
    engine = make_hf(folder)
    engine.sync(model)
    alone = tokens_of(roll(engine, GREEDY))
    assert run_ranks(gathered, 2, str(folder)) == [[alone, alone]] * 2


@pytest.mark.parametrize("kind", [BY_DEFAULT, *UNABLE])
def test_what_cant_be_batched_is_known_before(kind: str) -> None:
    config: Any = borrow(tiny_config(kind))
    assert bool(cant_batch(config)) == (kind in UNABLE)


def faults(model: Any, *more: str) -> list[str]:
    config = parse(RLConfig, [*REQUIRED, *more])
    return [str(fault) for fault in backend_faults(config, model, planning=True)]


def test_which_engine_samples_which_model(folder: Path, tmp_path: Path) -> None:
    """Transformers' modules need another engine than ours; our decoders none but ours."""
    make(tmp_path, "qwen2")
    ours = read_model_config(tmp_path)
    theirs: Any = read_any_config(folder)
    unable = borrow(tiny_config("opt"))
    hf = f"{ARR}rollout.name=hf"
    assert find_backend("hf", theirs) is HfEngine and find_backend("hf", ours) is Engine
    assert not faults(ours) and not faults(ours, hf) and not faults(theirs, hf)
    assert not faults(theirs, f"{ARR}rollout.name=server")
    (fault,) = faults(theirs)
    assert "rollout.name=native: model_type glm runs as transformers' module" in fault
    assert "Use actor_rollout_ref.rollout.name=hf" in fault
    (fault,) = (text for text in faults(unable, hf) if "name=hf" in text)
    assert "can't sample from model_type opt (" in fault
    with pytest.raises(ValueError, match="as transformers' module, which this one"):
        HfEngine(ours, CPU, EngineOptions()).sync(load(tmp_path))


@pytest.mark.parametrize(
    ("paged", "windowed", "right"),
    [(0.01, 0.01, True), (math.nan, 0.01, False), (0.01, math.nan, False), (0.01, 0.5, False)],
)
def test_flash_attn_samples_only_where_all_of_it_is_right(
    paged: float, windowed: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "find_spec", lambda _: True)
    monkeypatch.setattr(batching, "paged_error", lambda *_: paged)
    monkeypatch.setattr(batching, "kernel_error", lambda *_, **__: windowed)
    config = decoder_config(4, 2, vocab=31, hidden=16, ffn=24, layers=2, windows=(8, 0))
    with nullcontext() if right else pytest.warns(UserWarning, match="flash-attn computes wrongly"):
        found = flash_is_right(config, torch.device("cuda"), torch.bfloat16, 256)
    assert found == right


def test_what_hf_cant_do_is_refused(folder: Path) -> None:
    asked = {
        "trainer.deterministic=true": "neighbours",
        f"{ARR}rollout.top_k=5": "leaves out tokens",
        f"{ARR}rollout.dtype=bfloat16": "the trainer's",
        f"{ARR}rollout.tensor_model_parallel_size=2": "an engine on each GPU",
    }
    found = faults(read_any_config(folder), f"{ARR}rollout.name=hf", *asked)
    assert len(found) == len(asked)
    for what in asked.values():
        assert any(what in fault for fault in found)


def test_sequences_longer_than_the_module_is_right_for(tmp_path: Path) -> None:
    limited: Any = borrow(tiny_config("gpt2"))
    assert limited.longest
    (fault,) = faults(limited, f"{ARR}rollout.name=hf", "data.max_response_length=100000")
    assert "its table of positions" in fault and f"Use {limited.longest:,}" in fault
