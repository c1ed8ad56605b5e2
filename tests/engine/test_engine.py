"""The engine against transformers' `generate` and the training forward, and what must not change
its draws.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone
from retool.engine.kernels import attention
from retool.engine.schedule import ahead
from retool.model.build import ModelOptions
from retool.model.catalogue.families import read_model_config
from tests.engine.models import CPU, engine_of, forced, leaked, load, prompts, run
from tests.model.tiny import FAMILIES, make
from tests.real_data import real

GREEDY = SamplingParams(max_tokens=24, temperature=0)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pages of 3": {"page_size": 3},
    "chunks of 8": {"max_batch_tokens": 8},
    "one at a time": {"max_num_seqs": 1, "max_batch_tokens": 5},
    "preempting": {"page_size": 4, "pages": 24},
    "running ahead": {"run_ahead": True},
    "deterministic": {"deterministic": True},
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    make(folder, "qwen2")
    return folder


def generated(reference: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


# One family goes all ways, and the rest as they sample by default: a family has nothing to do with
# how prompts are scheduled. `slow` has them all.
EVERY_WAY = [pytest.param(family, WAYS, marks=pytest.mark.slow) for family in FAMILIES]
BY_DEFAULT = [(family, WAYS if family == "qwen2" else {"default": {}}) for family in FAMILIES]


@pytest.mark.parametrize(("family", "ways"), [*BY_DEFAULT, *EVERY_WAY])
def test_greedy_equals_transformers_generate(
    tmp_path: Path, family: str, ways: dict[str, dict[str, Any]]
) -> None:
    reference = make(tmp_path, family)
    model = load(tmp_path)
    steady = read_model_config(tmp_path).steady_length
    ids = prompts(5, steady - GREEDY.max_tokens if steady else 40, 131)
    want = [generated(reference, p, GREEDY.max_tokens) for p in ids]
    for name, way in ways.items():
        engine = engine_of(tmp_path, model, **way)
        for i, prompt in enumerate(ids):
            engine.start(i, prompt, GREEDY)
        done = run(engine)
        assert [done[i].tokens for i in range(len(ids))] == want, name
        assert {t.reason for t in done.values()} == {"length"}
        if name == "preempting" and family == "qwen2":
            assert engine.stats.preempted > 0, "the cache was large enough after all"
        for i in range(len(ids)):
            engine.drop(i)
        assert leaked(engine) == 0


def test_stories260k_tells_its_published_story() -> None:
    folder = real("stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time").input_ids
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = engine_of(folder, load(folder))
    engine.start("story", prompt, SamplingParams(max_tokens=200, temperature=0))
    story = run(engine)["story"].tokens
    assert story == generated(reference, prompt, 200)
    assert tokenizer.decode(story).startswith(
        ", there was a little girl named Lily. She loved to play outside in the park."
    )


def test_windows_and_caps_reach_the_sampler(tmp_path: Path) -> None:
    """Greedy tokens may be the same without them; their log-probabilities aren't."""
    make(tmp_path, "gemma2")
    model = load(tmp_path)
    (prompt,) = prompts(1, 30, 131, seed=1)
    engine = engine_of(tmp_path, model)
    engine.start(0, prompt, SamplingParams(max_tokens=6, temperature=1.0, seed=(0,)))
    done = run(engine)[0]
    want = forced(model, prompt + done.tokens)[len(prompt) - 1 :]
    assert (torch.tensor(done.logp) - want).abs().max() < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logp_is_the_training_forwards(qwen: Path, way: str, temperature: float) -> None:
    model = load(qwen)
    ids = prompts(6, 30, 131, seed=1)
    engine = engine_of(qwen, model, **WAYS[way])
    for i, prompt in enumerate(ids):
        engine.start(
            i,
            prompt,
            SamplingParams(
                max_tokens=20, temperature=temperature, top_p=0.8 if i % 2 else 1.0, seed=(i,)
            ),
        )
    done = run(engine)
    for i, prompt in enumerate(ids):
        want = forced(model, prompt + done[i].tokens, temperature)[len(prompt) - 1 :]
        assert (torch.tensor(done[i].logp) - want).abs().max() < 1e-5 / temperature
        behaviour = np.array(done[i].logp_behaviour)
        logp = np.array(done[i].logp)
        assert (
            (behaviour == logp).all()
            if i % 2 == 0
            else ((behaviour >= logp).all() and (behaviour > logp).any())
        )


def params_of(i: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=9 + i % 5,
        temperature=(1.0, 0.7, 1.3)[i % 3],
        top_p=(1.0, 0.9)[i % 2],
        top_k=(-1, 20)[i // 2 % 2],
        seed=(7, i),
    )


def sampled(engine: Engine, ids: list[list[int]], order: list[int]) -> list[TurnDone]:
    """Every prompt twice, with seeds of its own, at several temperatures and filters, then a second
    turn of each.
    """
    params = [params_of(i) for i in range(2 * len(ids))]
    for i in order:
        engine.start(i, ids[i // 2], params[i], group=i // 2)
    turns = {}
    while not engine.idle():
        for turn in engine.step():
            turns.setdefault(turn.key, []).append(turn)
            if len(turns[turn.key]) == 1:
                engine.extend(turn.key, [3, 1, 4, int(turn.key)], params[int(turn.key)])  # type: ignore[call-overload]
            else:
                engine.drop(turn.key)
    assert leaked(engine) == 0
    return [turn for i in range(len(params)) for turn in turns[i]]


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_draws_depend_on_seed_and_position_only(
    qwen: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch composition, page size, chunks, order of arrival, preemption and running ahead change
    nothing.
    """
    # Run on beside rows that are over
    monkeypatch.setattr(ahead, "MAX_EMPTY_SHARE", {False: 1 / 2, True: 1 / 4})
    monkeypatch.setattr(ahead, "MIN_NEWCOMER_SHARE", 1 / 2)
    model = load(qwen)
    ids = prompts(6, 30, 131, seed=2)
    want = sampled(engine_of(qwen, model), ids, list(range(12)))
    engine = engine_of(qwen, model, **WAYS[way])
    found = sampled(engine, ids, np.random.default_rng(0).permutation(12).tolist())
    assert [t.tokens for t in found] == [t.tokens for t in want]
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=3e-5)  # both sides' rounding
    other = [SamplingParams(max_tokens=30, seed=s) for s in ((1,), (2,), (1, 2), (2, 1))]
    engine = engine_of(qwen, model)
    for i, params in enumerate(other):
        engine.start(i, ids[0], params, group=0)
    assert len({tuple(t.tokens) for t in run(engine).values()}) == 4, (
        "seeds must matter, their order too"
    )


@pytest.mark.parametrize("way", ["plain", "preempting", "running ahead", "deterministic"])
def test_a_turn_in_pieces_draws_what_it_draws_at_once(qwen: Path, way: str) -> None:
    """Going on with no ids of one's own is the same turn."""
    model = load(qwen)
    ids = prompts(5, 30, 131, seed=4)
    params = [replace(params_of(i), max_tokens=20) for i in range(5)]
    engine = engine_of(qwen, model, **WAYS[way])
    for i, prompt in enumerate(ids):
        engine.start(i, prompt, params[i])
    want = run(engine)
    pieces: dict[int, list[int]] = {i: [] for i in range(5)}
    engine = engine_of(qwen, model, **WAYS[way])
    for i, prompt in enumerate(ids):
        engine.start(i, prompt, replace(params[i], max_tokens=1 + i))
    while not engine.idle():
        for turn in engine.step():
            i = int(turn.key)  # type: ignore[call-overload]
            pieces[i] += turn.tokens
            left = 20 - len(pieces[i])
            if left:
                engine.extend(i, [], replace(params[i], max_tokens=min(left, 1 + i)))
            else:
                engine.drop(i)
    assert pieces == {i: want[i].tokens for i in range(5)}


def test_deterministic_numbers_do_not_depend_on_neighbours(qwen: Path) -> None:
    """To the last bit: alone, in company of longer and shorter ones, preempted, in other chunks."""
    model = load(qwen)
    ids = [*prompts(5, 30, 131, seed=3), *prompts(2, 300, 131, seed=5)]
    options = {"deterministic": True, "max_num_seqs": 16, "page_size": 4}
    want = sampled(engine_of(qwen, model, **options), ids, list(range(14)))
    tight = engine_of(qwen, model, **options, pages=100)
    found = sampled(tight, ids, list(range(13, -1, -1)))
    assert tight.stats.preempted + tight.stats.evicted > 0
    assert [(t.tokens, t.logp, t.logp_behaviour) for t in found] == [
        (t.tokens, t.logp, t.logp_behaviour) for t in want
    ]
    for i in (0, 3, 8):
        alone = engine_of(qwen, model, **options)
        alone.start(i, ids[i // 2], params_of(i))
        assert run(alone)[i].logp == want[2 * i].logp


def test_long_prompts_are_attended_in_blocks(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(qwen)
    prompt = prompts(1, 100, 131, seed=9)[0] + list(range(100))
    monkeypatch.setattr(attention, "MAX_QUERIES_AT_ONCE", 7)
    engine = engine_of(qwen, model, max_batch_tokens=64)
    engine.start("long", prompt, SamplingParams(max_tokens=8, seed=(1,)))
    turn = run(engine)["long"]
    assert (torch.tensor(turn.logp) - forced(model, prompt + turn.tokens)[-8:]).abs().max() < 1e-5


def test_groups_share_one_prefill(qwen: Path) -> None:
    model = load(qwen)
    prompt = list(range(50, 93))
    want = {}
    for shared in (False, True):
        # Fewer than samples: later ones find the prompt still there
        engine = engine_of(qwen, model, max_num_seqs=3)
        for i in range(8):
            engine.start(
                i, prompt, SamplingParams(max_tokens=12, seed=(i,)), group="g" if shared else None
            )
        done = run(engine)
        tokens = [done[i].tokens for i in range(8)]
        assert want.setdefault("tokens", tokens) == tokens
        if shared:
            assert engine.stats.prefill_tokens == len(prompt) + 7
            assert engine.stats.shared_tokens == 7 * (len(prompt) - 1)
        else:
            assert engine.stats.prefill_tokens == 8 * len(prompt)
        for i in range(8):
            engine.drop(i)
        assert leaked(engine) == 0


def test_a_turn_goes_on_with_its_cache_and_without(qwen: Path) -> None:
    model = load(qwen)
    for evict in (False, True):
        engine = engine_of(qwen, model, pages=12)
        engine.start("a", list(range(30)), SamplingParams(max_tokens=10, seed=(1,)))
        first = run(engine)["a"].tokens
        if evict:
            engine.start("b", list(range(70)), SamplingParams(max_tokens=3))
            run(engine)
            engine.drop("b")
        engine.extend("a", [9, 8, 7], SamplingParams(max_tokens=8, seed=(2,)))
        second = run(engine)["a"]
        whole = [*range(30), *first, 9, 8, 7, *second.tokens]
        assert (torch.tensor(second.logp) - forced(model, whole)[-8:]).abs().max() < 1e-5
        assert engine.stats.evicted == evict
        # The last sampled token was not computed yet
        assert engine.stats.prefill_tokens == (30 + 70 + 43 if evict else 30 + 4)


@pytest.mark.parametrize("way", ["plain", "running ahead", "deterministic"])
def test_a_sequence_larger_than_the_cache_ends_and_says_so(qwen: Path, way: str) -> None:
    model = load(qwen)
    engine = engine_of(qwen, model, **WAYS[way], pages=5)  # 40 tokens
    engine.start("prompt", list(range(41)), SamplingParams(max_tokens=5))
    engine.start("grows", list(range(20)), SamplingParams(max_tokens=50, seed=(3,)))
    engine.start("fits", list(range(39)), SamplingParams(max_tokens=2, seed=(3,)))
    done = run(engine)
    assert (done["prompt"].reason, done["prompt"].tokens) == ("capacity", [])
    # The 41st token is drawn, not computed
    assert (done["grows"].reason, len(done["grows"].tokens)) == (
        "capacity",
        21,
    )
    assert (done["fits"].reason, len(done["fits"].tokens)) == ("length", 2)
    want = forced(model, [*range(20), *done["grows"].tokens])[19:]
    assert (torch.tensor(done["grows"].logp) - want).abs().max() < 1e-5
    for key in done:
        engine.drop(key)
    assert leaked(engine) == 0


def test_the_first_token_may_end_the_turn(qwen: Path) -> None:
    model = load(qwen)
    for run_ahead in (False, True):
        engine = engine_of(qwen, model, run_ahead=run_ahead)
        engine.start("a", [5, 6, 7], GREEDY)
        token = run(engine)["a"].tokens[0]
        engine.start(
            "b", [5, 6, 7], SamplingParams(max_tokens=9, temperature=0, stop_ids=(1, token))
        )
        turn = run(engine)["b"]
        assert (turn.reason, turn.tokens, len(turn.logp)) == ("stop", [token], 1)


def test_dropping_in_any_state_frees_everything(qwen: Path) -> None:
    engine = engine_of(qwen, load(qwen), max_num_seqs=2, max_batch_tokens=6, run_ahead=True)
    for i in range(6):
        engine.start(i, list(range(20)), SamplingParams(max_tokens=10, seed=(i,)), group=i // 3)
    for i in range(6):  # the first is the group's leader, in mid-prefill
        engine.step()
        engine.drop(i)
    assert run(engine) == {} and engine.idle() and leaked(engine) == 0


def test_mistakes_of_the_caller_are_named(qwen: Path) -> None:
    model = load(qwen)
    engine = Engine(read_model_config(qwen), CPU, EngineOptions(max_num_seqs=2, page_size=8))
    with pytest.raises(ValueError, match="call sync"):
        engine.start("a", [1], GREEDY)
    engine.sync(model)
    engine.start("a", [1], GREEDY, group="g")
    for message, call in {
        "started already": lambda: engine.start("a", [1], GREEDY),
        "empty prompt": lambda: engine.start("b", [], GREEDY),
        "another prompt": lambda: engine.start("b", [2], GREEDY, group="g"),
        "still waiting": lambda: engine.extend("a", [1], GREEDY),
        "unknown": lambda: engine.drop("z"),
        "top_p=0": lambda: SamplingParams(max_tokens=1, top_p=0),
        "max_tokens=0": lambda: SamplingParams(max_tokens=0),
        "max_batch_tokens=4 is less": lambda: EngineOptions(max_num_seqs=5, max_batch_tokens=4),
        "room for 0 pages": lambda: engine_of(qwen, model, kv_bytes=10),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert run(engine)["a"].reason == "length"


def test_bf16_and_fp64_run_as_they_are(qwen: Path) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 0.15)):
        master = dtype if dtype == torch.float64 else torch.float32
        model = load(
            qwen, ModelOptions(param_dtype=dtype, master_dtype=master, reduce_dtype=master)
        )
        engine = engine_of(qwen, model)
        engine.start("a", list(range(20)), SamplingParams(max_tokens=30, seed=(4,)))
        turn = run(engine)["a"]
        want = forced(model, [*range(20), *turn.tokens])[19:]
        assert (torch.tensor(turn.logp, dtype=want.dtype) - want).abs().max() < bound, dtype


def test_synced_weights_are_the_ones_that_sample(qwen: Path) -> None:
    """In place: the engine's memory stays where it is, and a turn under way goes on."""
    model = load(qwen)
    engine = engine_of(qwen, model)
    where = [b.data_ptr() for b in engine.weights.buffers]
    engine.start("a", [1, 2, 3], GREEDY)
    before = run(engine)["a"].tokens
    model.master.mul_(
        torch.where(
            torch.rand(model.master.shape, generator=torch.Generator().manual_seed(0)) < 0.3,
            0.0,
            1.0,
        )
    )
    model.refresh()
    engine.start("b", [1, 2, 3], GREEDY)
    assert run(engine)["b"].tokens == before, "weights change with sync, not before"
    engine.sync(model)
    engine.start("c", [1, 2, 3], GREEDY)
    after = run(engine)["c"]
    assert after.tokens != before and [b.data_ptr() for b in engine.weights.buffers] == where
    assert (
        torch.tensor(after.logp) - forced(model, [1, 2, 3, *after.tokens])[2:]
    ).abs().max() < 1e-5


def test_released_memory_comes_back_with_the_next_sync(qwen: Path) -> None:
    model = load(qwen)
    engine = engine_of(qwen, model, run_ahead=True)
    engine.start("a", [1, 2, 3], GREEDY)
    before = run(engine)["a"].tokens
    engine.release()
    engine.release()  # one that failed amid a step, and then for the update
    assert engine.idle() and not engine.weights.buffers
    engine.sync(model)
    engine.start("a", [1, 2, 3], GREEDY)
    assert run(engine)["a"].tokens == before
