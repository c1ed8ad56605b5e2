"""`rollout.name=vllm` against a double of vLLM's: the same tokens as the native engine, other weights
after every update, sleep, two ranks that are told alike, and what is refused. The real one is in
tests/rl/test_gpu_vllm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from retool.config import parse
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone, find_backend
from retool.engine.vllm.engine import VllmEngine
from retool.model.catalogue.families import read_model_config
from retool.parallel.fsdp import Sharded
from retool.parallel.shared_work import SharedWork
from retool.rl.config import RLConfig
from retool.rl.preflight.backends import backend_faults
from retool.rl.preflight.show import in_words
from tests.engine import vllm_double
from tests.engine.models import CPU, engine_of, forced, load, tokens_of, two_turns
from tests.model.tiny import make
from tests.ranks import run_ranks
from tests.rl.test_config import ARR, REQUIRED

PROMPTS = {"a": [5, 6, 7, 8], "b": [9, 10, 11], "c": [30, 31, 32]}
GREEDY = SamplingParams(max_tokens=6, temperature=0)
LONGEST = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm") / "qwen2"
    make(path, "qwen2")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Sharded:
    return load(folder)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM is installed."""
    vllm_double.install(monkeypatch)
    alone = not dist.is_initialized()
    yield
    if alone and dist.is_initialized():
        dist.destroy_process_group()


def make_vllm(folder: Path, group: Any = None) -> VllmEngine:
    options = EngineOptions(max_num_seqs=8, max_length=LONGEST, model_folder=folder)
    return VllmEngine(read_model_config(folder), CPU, options, group)


def roll(engine: Any, params: SamplingParams) -> dict[Any, list[TurnDone]]:
    return two_turns(engine, PROMPTS, params)


def test_turns_are_the_native_engines(double: None, folder: Path, model: Sharded) -> None:
    """And so they are with other weights, which come after a sleep, and after none."""
    engine = make_vllm(folder)
    native = engine_of(folder, model)
    before = model.compute.clone()
    seen = []
    for scale, sleeps in ((1.0, False), (0.5, True), (0.8, False)):
        model.compute.copy_(before * scale)
        engine.sync(model)
        native.sync(model)
        assert tokens_of(roll(engine, GREEDY)) == tokens_of(roll(native, GREEDY))
        seen.append(tokens_of(roll(engine, GREEDY)))
        if sleeps:
            engine.release()
            assert engine.vllm.asleep == {"weights", "kv_cache"}
    model.compute.copy_(before)
    assert seen[0] != seen[1] != seen[2]
    engine.close()


def test_log_probabilities_are_the_trainers(double: None, folder: Path, model: Sharded) -> None:
    """At a temperature, of the whole vocabulary; seeds give the draws, for each turn its own."""
    engine = make_vllm(folder)
    engine.sync(model)
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=(3, 1))
    first = roll(engine, params)
    for key, (one, two) in first.items():
        ids = [*PROMPTS[key], *one.tokens, 3, 4, *two.tokens]
        truth = forced(model, ids, 0.7).tolist()
        begin = len(PROMPTS[key]) - 1
        assert one.logp == pytest.approx(truth[begin : begin + 6], abs=1e-4)
        assert two.logp == pytest.approx(truth[-6:], abs=1e-4)
        assert one.logp_behaviour == one.logp
    assert tokens_of(roll(engine, params)) == tokens_of(first)
    other = SamplingParams(max_tokens=6, temperature=0.7, seed=(3, 2))
    assert tokens_of(roll(engine, other)) != tokens_of(first)


def test_how_turns_end(double: None, folder: Path, model: Sharded) -> None:
    engine = make_vllm(folder)
    engine.sync(model)
    greedy = roll(engine, GREEDY)["a"][0]
    last = greedy.tokens[2]
    engine.start(
        "stop", PROMPTS["a"], SamplingParams(max_tokens=6, temperature=0, stop_ids=(last,))
    )
    engine.start("room", [7] * (LONGEST - 2), GREEDY)
    engine.start("full", [7] * LONGEST, GREEDY)
    engine.start("gone", PROMPTS["b"], GREEDY)
    engine.drop("gone")
    ended = {}
    while not engine.idle():
        ended |= {turn.key: turn for turn in engine.step()}
    assert set(ended) == {"stop", "room", "full"}
    assert greedy.reason == "length"
    assert ended["stop"].reason == "stop"
    assert ended["stop"].tokens == greedy.tokens[: greedy.tokens.index(last) + 1]
    assert ended["room"].reason == ended["full"].reason == "capacity"
    assert len(ended["room"].tokens) == 2 and not ended["full"].tokens


def test_weights_that_the_trainer_lacks_are_refused(
    double: None, folder: Path, model: Sharded, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_vllm(folder)
    with pytest.raises(ValueError, match="call sync"):
        engine.start("a", [1, 2], GREEDY)
        engine.step()
    taken = vllm_double.LLMEngine._load_weights
    monkeypatch.setattr(
        vllm_double.LLMEngine,
        "_load_weights",
        lambda self, pairs: {name for name in taken(self, pairs) if "layers.1" not in name},
    )
    with pytest.raises(ValueError, match=r"the trainer hasn't \(model.layers.1"):
        engine.sync(model)


def test_a_process_has_one_engine(
    double: None, folder: Path, model: Sharded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_double.LLMEngine, "alone", True)
    first = make_vllm(folder)
    first.sync(model)
    first.close()
    with pytest.raises(ValueError, match="and can't have a second one"):
        make_vllm(folder).sync(model)


def lead(engine: VllmEngine) -> list[list[int]]:
    """Rank 0's part of a rollout, which ends with a sequence that is dropped under way."""
    found = tokens_of(roll(engine, GREEDY))
    engine.start("late", [1, 2, 3], GREEDY)
    engine.step()
    engine.drop("late")
    engine.end()
    return found


def test_ranks_of_an_engine_do_what_rank_0_does(
    double: None, folder: Path, model: Sharded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rank 0 sends is all that another needs."""
    first = make_vllm(folder)
    other = make_vllm(folder)
    for engine in (first, other):
        engine.sync(model)
    sent: list[Any] = []
    monkeypatch.setattr(SharedWork, "_broadcast", lambda _, message: sent.append(message))
    first.shared = SharedWork(cast(Any, "two ranks"))
    found = lead(first)
    assert found == tokens_of(roll(engine_of(folder, model), GREEDY))
    monkeypatch.setattr(SharedWork, "_broadcast", lambda *_: sent.pop(0))
    other.follow()
    assert not sent and other.vllm.log == first.vllm.log
    assert first.vllm.log[-1] == ["6"] and not other.vllm.requests


def shared_engine(folder: str) -> Any:
    """One engine over two ranks: what each rank's vLLM was told, and rank 0's turns."""
    model = load(Path(folder))
    with pytest.MonkeyPatch.context() as patch:
        vllm_double.install(patch)
        engine = make_vllm(Path(folder), dist.group.WORLD)
        engine.sync(model)
        found = None
        if dist.get_rank() == 0:
            found = lead(engine)
        else:
            engine.follow()
        return found, engine.vllm.log, engine.vllm.arguments.tensor_parallel_size


@pytest.mark.slow
def test_an_engine_over_two_ranks(folder: Path, model: Sharded) -> None:
    (found, told, size), (nothing, heard, other) = run_ranks(shared_engine, 2, str(folder))
    assert found == tokens_of(roll(engine_of(folder, model), GREEDY)) and nothing is None
    assert told == heard and size == other == 2


def test_vllm_is_itself_where_it_is_installed(double: None) -> None:
    assert find_backend("vllm") is VllmEngine and find_backend("sglang") is Engine
    config = parse(RLConfig, [*REQUIRED, f"{ARR}rollout.name=vllm"])
    report: Any = SimpleNamespace(config=config, model=None)
    _, text = next(in_words(report))
    assert text.startswith("rollout.name=vllm: vLLM 0.22.1 samples in the training processes.")
    assert "rollout.name=native" in text


def test_what_vllm_cant_do_is_refused(double: None, folder: Path) -> None:
    asked = {
        "trainer.device=cpu": "needs a GPU",
        "trainer.deterministic=true": "neighbours",
        f"{ARR}rollout.top_p=0.9": "leaves out tokens",
        f"{ARR}rollout.enable_rollout_routing_replay=true": "experts",
        f"{ARR}rollout.tensor_model_parallel_size=4": "must divide the model's 6 heads",
    }
    config = parse(RLConfig, [*REQUIRED, f"{ARR}rollout.name=vllm", *asked])
    found = list(map(str, backend_faults(config, read_model_config(folder), planning=False)))
    assert len(found) == len(asked)
    for what in asked.values():
        assert any(what in fault for fault in found)
    # The GPU may be elsewhere
    planned = list(map(str, backend_faults(config, read_model_config(folder), planning=True)))
    assert len(planned) == len(asked) - 1
