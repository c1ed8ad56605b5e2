"""Steps of shapes that recur, as graphs run them, on the CPU: flash-attn's paged kernels and CUDA
graphs are in CPU clothes here.

The kernels look at nothing but tensors, as on a GPU, where a graph goes on reading what lay there
when it was recorded.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone, runner
from retool.engine import engine as engine_module
from retool.engine import worker as worker_module
from retool.engine.chunks import Chunks
from retool.engine.decode import DecodeLoop
from retool.engine.kernels import attention
from retool.engine.kernels.attention import _attend, _gathered
from retool.engine.kernels.pages import Pages, Seen
from retool.engine.schedule import ahead as ahead_module
from retool.engine.schedule.batch import Change
from retool.model.catalogue.families import read_model_config
from retool.parallel.mesh import make_mesh
from tests.engine.models import CPU, engine_of, leaked, load, prompts, run
from tests.model.tiny import make
from tests.ranks import run_ranks


def chunks_kernel(q_TNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    """What `flash_attn_varlen_func` computes over pages: the last queries of each item, causal.

    It breaks where a query has no key.
    """
    assert pages.offsets is not None and pages.key_offsets is not None
    out = torch.full_like(q_TNH, float("nan"))  # beyond the last item nothing is written
    tables = pages.tables[pages.decode :]
    ends = pages.offsets.tolist()
    assert len(tables) == len(ends) - 1 and max(pages.counts) >= max(np.diff(ends))
    for table, start, stop, length in zip(
        tables, ends[:-1], ends[1:], pages.key_offsets.diff().tolist(), strict=True
    ):
        assert stop - start <= length <= max(pages.host_lengths)
        if stop > start:
            assert len(table) * data.shape[1] >= length
            keys = _gathered(data, table[None, : -(-length // data.shape[1])])[:, :length]
            lengths = torch.tensor([length])
            out[start:stop] = _attend(q_TNH[None, start:stop], keys, lengths, seen)[0]
    return out


class Recording:
    """A CUDA graph: what is called between begin and end isn't run then, but at each replay, into
    the tensors of then.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def pool(self) -> None:
        pass

    def replay(self) -> None:
        for call in self.calls:
            call()


def in_cpu_clothes(patch: pytest.MonkeyPatch, graphs: bool) -> None:
    """Engines made from now on believe in kernels of a GPU, and with `graphs` record their steps."""
    patch.setitem(attention.KERNELS, "triton", (chunks_kernel, attention._torch_decode))
    patch.setattr(engine_module, "choose_paged", lambda *_, **__: "triton")
    if not graphs:
        return
    now: list[Recording] = []
    init = Chunks.__init__
    loop_init = DecodeLoop.__init__

    def recorded(step: Callable[..., None]) -> Callable[..., None]:
        return lambda *words: now[-1].calls.append(lambda: step(*words)) if now else step(*words)

    @contextmanager
    def recorder(graph: Recording, pool: object) -> Iterator[None]:
        now.append(graph)
        yield
        now.pop()

    recordings: list[Any] = []

    def shared(self: DecodeLoop, *arguments: Any) -> None:
        recordings.append(worker_module.Recordings())
        loop_init(self, *arguments)
        self.recordings = recordings[-1]

    def also(self: Chunks, *arguments: Any) -> None:
        init(self, *arguments)
        self.recordings = recordings[-1]

    stream = SimpleNamespace(wait_stream=lambda _: None)
    fakes = {
        "synchronize": lambda: None,
        "Stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda: stream,
        "CUDAGraph": Recording,
        "graph_pool_handle": lambda: (0, 1),
    }
    patch.setattr(runner, "capture", recorder)
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)
    for kind, made in ((DecodeLoop, shared), (Chunks, also)):
        patch.setattr(kind, "_step", recorded(kind._step))
        patch.setattr(kind, "__init__", made)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    make(folder, "qwen2")
    return folder


def two_turns(engine: Engine, ids: list[list[int]]) -> list[TurnDone]:
    """Two samples of each prompt, at several lengths and filters, and a second turn after some
    given tokens.
    """
    turns: dict[Any, list[TurnDone]] = {}

    def params(i: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=3 + i % 7,
            temperature=(1.0, 0.7, 0.0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            seed=(i,),
        )

    for i in range(2 * len(ids)):
        engine.start(i, ids[i // 2], params(i), group=i // 2)
    while not engine.idle():
        for turn in engine.step():
            turns.setdefault(turn.key, []).append(turn)
            if len(turns[turn.key]) == 1:
                engine.extend(turn.key, ids[int(turn.key) // 3][:9], params(int(turn.key)))  # type: ignore[call-overload]
            else:
                engine.drop(turn.key)
    assert leaked(engine) == 0
    return [turn for i in range(2 * len(ids)) for turn in turns[i]]


def same(found: list[TurnDone], want: list[TurnDone]) -> None:
    assert [t.tokens for t in found] == [t.tokens for t in want]
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=3e-5)


def test_after_a_first_recording_that_broke_off_another_pool_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch refuses one that has memory in use and no recording, and an engine is tried again."""
    in_cpu_clothes(monkeypatch, graphs=True)
    handles = itertools.count(1)
    taken: list[object] = []

    @contextmanager
    def recorder(_: Recording, pool: object) -> Iterator[None]:
        taken.append(pool)
        yield

    def out_of_memory() -> None:
        if taken:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
    monkeypatch.setattr(runner, "capture", recorder)
    recordings = runner.Recordings()
    with pytest.raises(RuntimeError, match="out of memory"):
        recordings.run("one", out_of_memory)
    recordings.run("one", lambda: None)
    recordings.run("another", lambda: None)
    assert taken == [(0, 1), (0, 2), (0, 2)]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "way",
    [{}, {"max_batch_tokens": 24}, {"page_size": 4, "pages": 40}, {"max_num_seqs": 2}],
    ids=str,
)
def test_chunks_apart_draw_what_whole_steps_draw(
    qwen: Path, way: dict[str, Any], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short prompts, shared ones, cut ones, preempted ones, and the texts between turns."""
    model = load(qwen)
    ids = prompts(7, 60, 131, seed=4)
    want = two_turns(engine_of(qwen, model), ids)
    in_cpu_clothes(monkeypatch, graphs)
    monkeypatch.setattr(worker_module, "run_once", None)  # never needed
    engine = engine_of(qwen, model, **{"max_length": 120, **way})
    same(two_turns(engine, ids), want)
    chunks = engine._worker.chunks
    assert chunks is not None
    assert bool(engine._worker.model.cache.data.isfinite().all()), (
        "padding wrote what isn't a number"
    )
    if graphs:
        assert chunks.recordings is not None
        kinds = [key[0] for key in chunks.recordings.graphs]  # type: ignore[index]
        assert kinds.count("decode") >= 2 and kinds.count("chunks") >= 1
    if way.get("pages"):
        assert engine.stats.preempted > 0, "the cache was large enough after all"


def hurried(
    engine: Engine, scripts: list[tuple[list[int], list[list[int]]]], rng: random.Random
) -> dict[int, list[TurnDone]]:
    """Start, extend and drop sequences at any moment: `scripts` has each one's prompt and what is
    given after each of its turns.
    """
    turns: dict[int, list[TurnDone]] = {i: [] for i in range(len(scripts))}
    to_start = list(turns)
    to_extend = list[int]()
    gone = set[int]()
    rng.shuffle(to_start)
    for _ in range(4000):
        while to_start and rng.random() < 0.5:
            i = to_start.pop()
            engine.start(i, scripts[i][0], params_of(i, 0), group=i % 4 if i % 4 < 2 else None)
        for i in [i for i in to_extend if rng.random() < 0.4]:
            to_extend.remove(i)
            engine.extend(i, scripts[i][1][len(turns[i]) - 1], params_of(i, len(turns[i])))
        for turn in engine.step():
            i = int(turn.key)  # type: ignore[call-overload]
            turns[i].append(turn)
            if turn.reason == "length" and len(turns[i]) <= len(scripts[i][1]):
                to_extend.append(i)
            else:
                gone.add(i)
                engine.drop(i)
        running = [s for s in engine._ready().running if s.key not in gone]
        if rng.random() < 0.02 and running:
            i = int(rng.choice(running).key)  # type: ignore[call-overload]
            gone.add(i)
            engine.drop(i)
        if len(gone) == len(scripts):
            assert leaked(engine) == 0
            return turns
    raise AssertionError(f"stalled: {engine.stats}")


def params_of(i: int, turn: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=1 + (3 * i + turn) % 11,
        temperature=(1.0, 0.6)[i % 2],
        top_p=(1.0, 0.9)[i // 2 % 2],
        seed=(i, turn),
    )


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 30))]
)
def test_any_moment_is_a_good_one_to_come_or_go(
    qwen: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences join rows that run ahead and leave them; each draws what it draws where all come at
    once, in an engine that does one thing at a time.
    """
    rng = random.Random(seed)
    model = load(qwen)
    heads = prompts(4, 40, 131, seed=seed)
    scripts = [
        (
            heads[i % 4] if i % 4 < 2 else prompts(1, 50, 131, seed=99 * seed + i)[0],
            [
                prompts(1, 20, 131, seed=i + n)[0][: rng.randint(0, 20)]
                for n in range(rng.randint(0, 3))
            ],
        )
        for i in range(20)
    ]
    calm = engine_of(qwen, model, max_num_seqs=len(scripts))
    in_cpu_clothes(monkeypatch, graphs=rng.random() < 0.5)
    monkeypatch.setattr(ahead_module, "MAX_STEPS_TO_WAIT", 2)
    sparse = rng.choice([2, 4])
    tolerated = rng.choice([2, 16])
    monkeypatch.setattr(ahead_module, "MAX_EMPTY_SHARE", {False: 1 / tolerated, True: 1 / sparse})
    monkeypatch.setattr(ahead_module, "MIN_NEWCOMER_SHARE", 1 / tolerated)
    most = rng.choice([2, 5, 8])
    engine = engine_of(
        qwen,
        model,
        max_num_seqs=most,
        page_size=rng.choice([2, 8]),
        pages=rng.choice([60, 300]),
        max_length=150,
        max_batch_tokens=rng.choice([most, 24, 200]),
    )
    joined = count_joins(monkeypatch)
    going = {i: turns for i, turns in hurried(engine, scripts, rng).items() if turns}
    for i in going:
        calm.start(i, scripts[i][0], params_of(i, 0))
    for n in itertools.count():
        wanted = run(calm)
        for i, turns in going.items():
            same([turns[n]], [wanted[i]])
        going = {i: turns for i, turns in going.items() if len(turns) > n + 1}
        if not going:
            break
        for i in going:
            calm.extend(i, scripts[i][1][n], params_of(i, n + 1))
    assert joined["drawn"] + joined["known"] > 0 or most == 2


def counted(*counts: int) -> list[list[int]]:
    """Prompts of so many tokens."""
    return [[(7 * n + k) % 131 for k in range(count)] for n, count in enumerate(counts)]


EDGES: dict[
    str, tuple[dict[str, Any], list[list[int]], list[int], list[int | None]]
] = {  # options, prompts, turns' lengths, groups
    "one token of a shared prompt is left": (
        {"max_batch_tokens": 9},
        [*counted(10)] * 3,
        [9, 9, 9],
        [0, 0, 0],
    ),
    "a text is cut after its first token": (
        {"max_batch_tokens": 8, "max_num_seqs": 3},
        counted(2, 2, 2),
        [3, 3, 20],
        [None] * 3,
    ),
    "a leader goes on alone in a shared page": (
        {"max_num_seqs": 1},
        [*counted(10)] * 3,
        [1, 5, 5],
        [0, 0, 0],
    ),
    "a cut prompt has room for one token": (
        {"max_batch_tokens": 5, "max_num_seqs": 5},
        counted(2, 2, 2, 2, 30),
        [30, 29, 28, 27, 5],
        [None] * 5,
    ),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_chunks_and_pages(qwen: Path, edge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns of each, with a text of five tokens between them."""
    options, heads, lengths, groups = EDGES[edge]
    model = load(qwen)
    found = list[list[TurnDone]]()
    for apart in (False, True):
        if apart:
            in_cpu_clothes(monkeypatch, False)
        engine = engine_of(qwen, model, **options)
        turns = dict[Any, list[TurnDone]]()
        for i, (prompt, group) in enumerate(zip(heads, groups, strict=True)):
            engine.start(i, prompt, SamplingParams(max_tokens=lengths[i], seed=(i,)), group=group)
        while not engine.idle():
            for turn in engine.step():
                turns.setdefault(turn.key, []).append(turn)
                if len(turns[turn.key]) == 1:
                    engine.extend(
                        turn.key, [3, 1, 4, 1, 5], SamplingParams(max_tokens=6, seed=(0,))
                    )
                else:
                    engine.drop(turn.key)
        assert leaked(engine) == 0
        found.append([turn for i in range(len(heads)) for turn in turns[i]])
    same(found[1], found[0])


def count_joins(patch: pytest.MonkeyPatch) -> dict[str, int]:
    joined = {"drawn": 0, "known": 0, "held": 0}
    join = DecodeLoop._join
    again = DecodeLoop.again

    def counted(self: DecodeLoop, change: Change, drawn: Tensor | None) -> None:
        known = int((change.joins[1] < 0).sum())
        joined["known"] += known
        joined["drawn"] += change.joins.shape[1] - known
        join(self, change, drawn)

    def told(self: DecodeLoop, change: Change, drawn: Tensor | None) -> Any:
        joined["held"] += not change.runs
        return again(self, change, drawn)

    patch.setattr(DecodeLoop, "_join", counted)
    patch.setattr(DecodeLoop, "again", told)
    return joined


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_wait_while_prompts_fill_steps(
    qwen: Path, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All prompts first, then the answers; each draws what it draws in an engine that does both at
    once.
    """
    model = load(qwen)
    heads = [prompts(1, 131, 131, seed=i)[0][:1] * 20 for i in range(12 // groups)]
    found = list[list[TurnDone]]()
    steps = list[int]()
    held = list[int]()
    for apart in (False, True):
        if apart:
            in_cpu_clothes(monkeypatch, True)
        joined = count_joins(monkeypatch)
        engine = engine_of(qwen, model, max_num_seqs=12, max_batch_tokens=40)
        for i in range(12):
            engine.start(
                i, heads[i // groups], SamplingParams(max_tokens=10, seed=(i,)), group=i // groups
            )
        done = run(engine)
        found.append([done[i] for i in range(12)])
        steps.append(engine.stats.steps)
        assert engine.stats.sampled_tokens == 120
        held.append(joined["held"])
    same(found[1], found[0])
    assert held == [0, 5 if groups == 1 else 0] and steps[1] <= 6 + 9, (
        "two prompts a step, six times, then nine tokens each"
    )


def test_single_tokens_take_no_room_from_chunks(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of a row that decodes nor the last ones of a prompt that was shared."""
    in_cpu_clothes(monkeypatch, False)
    engine = engine_of(qwen, load(qwen), max_batch_tokens=24)
    sizes = list[int]()
    fill = Chunks._fill
    monkeypatch.setattr(
        Chunks,
        "_fill",
        lambda self, batch, *shape: (sizes.append(len(batch.tokens)), fill(self, batch, *shape)),
    )
    engine.start("decodes", [1, 2, 3], SamplingParams(max_tokens=30))
    engine.step()
    for i, prompt in enumerate([[4] * 24] * 3 + [[5] * 24]):
        engine.start(i, prompt, SamplingParams(max_tokens=2), group=prompt[0])
    run(engine)
    assert sizes == [3, 24, 24]


def test_shapes_are_few_and_large_enough(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_cpu_clothes(monkeypatch, False)
    engine = engine_of(qwen, load(qwen), max_batch_tokens=5000, max_num_seqs=300)
    chunks = engine._worker.chunks
    assert chunks is not None
    shapes = {
        (t, n, most): chunks.shape(t, n, most)
        for t in range(2, 5001, 7)
        for n in {1, 15, 16, 63, 64, 300}
        if 2 * n <= t
        for most in {-(-t // n), t - 2 * (n - 1)}
    }
    assert all(
        size >= t and items >= n + (size - t) / 256 and longest >= most
        for (t, n, most), (size, items, longest) in shapes.items()
    )
    assert {size for size, *_ in shapes.values()} == {256, 512, 1024, 2048, 4096, 5000}
    assert {items for _, items, _ in shapes.values()} == {16, 64, 256, 320}
    assert {longest for *_, longest in shapes.values()} == {256, 512, 1024, 2048, 4096, 5000}
    assert len(set(shapes.values())) < 48


def test_recording_a_step_leaves_no_trace(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a graph is recorded, with a full page table too, the draws are those of an engine
    without graphs.
    """
    plain = engine_of(qwen, load(qwen), run_ahead=True, max_length=24)
    in_cpu_clothes(monkeypatch, True)
    engine = engine_of(qwen, load(qwen), run_ahead=True, max_length=24)
    assert engine._worker.loop is not None and engine._worker.loop.recordings is not None
    graphs = engine._worker.loop.recordings.graphs
    seen = 0
    found = []
    for ends in range(11, 16):
        graphs.clear()
        found.clear()
        for one in (engine, plain):
            one.start("a", list(range(10)), SamplingParams(max_tokens=ends, seed=(1,)))
            one.start("b", list(range(30, 40)), SamplingParams(max_tokens=50, seed=(2,)))
            done = run(one)
            found.append([(done[key].tokens, done[key].reason) for key in "ab"])
            for key in "ab":
                one.drop(key)
        seen += len(graphs)
        assert found[0] == found[1], ends
    assert seen > 5 and found[0][1][1] == "capacity"


def over_two_ranks(folder: str, graphs: bool) -> Any:
    patch = pytest.MonkeyPatch()
    mesh = make_mesh(device="cpu")
    model = load_pretrained(folder, mesh)
    in_cpu_clothes(patch, graphs)
    try:
        options = EngineOptions(max_num_seqs=5, page_size=8, max_batch_tokens=25, max_length=120)
        engine = Engine(read_model_config(folder), CPU, options, mesh.world_group)
        engine.sync(model)
        if dist.get_rank() == 0:
            found = [(t.tokens, t.logp) for t in two_turns(engine, prompts(4, 60, 131, seed=5))]
            engine.end()
            return found
        engine.follow()
    finally:
        patch.undo()


@pytest.mark.parametrize("graphs", [False, True])
def test_chunks_apart_with_heads_over_two_ranks(qwen: Path, graphs: bool) -> None:
    want = two_turns(engine_of(qwen, load(qwen)), prompts(4, 60, 131, seed=5))
    found, _ = run_ranks(over_two_ranks, 2, str(qwen), graphs)
    for (tokens, logp), turn in zip(found, want, strict=True):
        assert tokens == turn.tokens
        np.testing.assert_allclose(logp, turn.logp, atol=3e-5)
