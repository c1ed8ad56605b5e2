"""The engine on CUDA: kernels against the CPU's, graphs that survive new weights, the bf16 gap to
the trainer.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone, forward
from retool.engine import engine as engine_module
from retool.engine.kernels.attention import choose_paged, paged_attention, paged_error
from retool.engine.kernels.draws import Draws, seed_key
from retool.engine.kernels.kv_cache import KVCache
from retool.engine.kernels.pages import Pages
from retool.engine.kernels.place import can_place
from retool.engine.kernels.sampling import sample
from retool.engine.runner import Recordings
from retool.model.attention.dispatch import choose_backend, kernel_error
from retool.model.build import ModelOptions, build_decoder
from retool.parallel.fsdp import Sharded, local_pieces
from retool.parallel.mesh import make_mesh
from tests.engine.models import forced, leaked, prompts, run
from tests.engine.test_place_triton import compare as compare_placed
from tests.engine.test_recordings import hurried, params_of
from tests.model.decoders import decoder_config
from tests.ranks import need_gpus, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
DEVICE = torch.device("cuda")
CONFIG = decoder_config(
    4, 2, vocab=3001, hidden=256, ffn=512, layers=4, head_dim=64, tied=True, max_position=2048
)
# bf16, random weights with wide logits: the CPU has 1.0e-2. Other weights or positions are off by
# more than 1.
GAP = 2e-2


def model_of(seed: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE.type) -> Sharded:
    model = build_decoder(CONFIG, make_mesh(device=device), ModelOptions(param_dtype=dtype))
    change(model, seed)
    return model


def change(model: Sharded, seed: int) -> None:
    """Other random weights, the same on every device and layout."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        m.name: torch.randn(m.shape, generator=generator) * 0.06 + ("norm" in m.name)
        for _, m in model.layout.members
    }
    for p in local_pieces(model.layout, model.mesh.shard_rank):
        model.master[p.local : p.local + p.stop - p.start] = (
            values[p.member.name].flatten()[p.start : p.stop].to(model.master)
        )
    model.refresh()


def engine_of(model: Sharded, **options: Any) -> Engine:
    engine = Engine(
        CONFIG,
        model.mesh.device,
        EngineOptions(**{"max_num_seqs": 24, "kv_bytes": 1 << 26, **options}),
    )
    engine.sync(model)
    return engine


def test_steps_are_recorded_after_a_first_one_that_broke_off() -> None:
    """An engine is tried again: what the broken recording took may still be in use then."""
    need_gpus(1)
    recordings = Recordings()
    x = torch.ones(64, 64, device=DEVICE)
    kept: list[torch.Tensor] = []

    def broken() -> None:
        product = x @ x
        if torch.cuda.is_current_stream_capturing():
            kept.append(product)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recordings.run("one", broken)

    def count() -> None:
        x.add_(1)

    for key in ("one", "another"):
        recordings.run(key, count)
    # A step is run twice before it is recorded, and once as recorded
    assert len(kept) == 1 and bool((x == 7).all())


def sampled(engine: Engine, tag: str, temperature: float = 1.0, count: int = 40) -> list[TurnDone]:
    for i, prompt in enumerate(prompts(count, 600, CONFIG.vocab)):
        params = SamplingParams(
            max_tokens=20 + i, temperature=temperature, top_p=0.9 if i % 4 == 1 else 1.0, seed=(i,)
        )
        engine.start((tag, i), prompt, params, group=(tag, i))
    done = run(engine)
    for key in done:
        engine.drop(key)
    assert leaked(engine) == 0
    return [done[tag, i] for i in range(count)]


@pytest.mark.parametrize("kernels", ["flash", "triton", "triton, longer ones in more parts"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (4, 4, 128), (16, 8, 64)])
def test_paged_kernels_equal_torch(
    heads: int, kv_heads: int, head_dim: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode rows and chunks in one call, pages in random order; against fp32 on the same bf16
    values.
    """
    if kernels == "flash":
        pytest.importorskip("flash_attn")
    else:
        from retool.engine.kernels import attention_triton

        monkeypatch.setattr(attention_triton, "LONG", 1 << 20 if kernels == "triton" else 200)
        kernels = "triton"
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 300, 256, 1000, 700, 300]
    counts = [1, 1, 1, 1, 130, 300]
    cache = KVCache((1, 256, kv_heads, head_dim), 40, torch.bfloat16, DEVICE)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    q = torch.randn(sum(counts), heads, head_dim, generator=generator).to(DEVICE, torch.bfloat16)
    order = (torch.randperm(39, generator=generator) + 1).tolist()
    tables = torch.zeros(6, 4, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for place in range(-(-length // 256)):
            tables[row, place] = order.pop()
    offsets = [
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 130, 430], [0, 700, 1000])
    ]
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    both = slots, tables.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), 4
    mixed = Pages(*both, *offsets, counts=(130, 300), host_lengths=(700, 300))
    alone = Pages(*both, host_lengths=tuple(lengths[:4]), each_alone=True)  # single tokens only
    many = Pages(slots, both[1][:4].repeat(300, 1), both[2][:4].repeat(300), 1200)  # a part of each
    full = Pages(slots, both[1][:4].repeat(64, 1), both[2][:4].repeat(64), 256)  # read deep
    cache_32 = KVCache((1, 256, kv_heads, head_dim), 40, torch.float32, DEVICE)
    cache_32.data.copy_(cache.data)
    rows = [(many, q[:4].repeat(300, 1, 1)), (full, q[:4].repeat(64, 1, 1))]
    for pages, queries in ((mixed, q), (alone, q[:4]), *rows):
        fast = paged_attention(queries, cache, 0, pages, kernels).float()
        exact = paged_attention(queries.float(), cache_32, 0, pages, "torch")
        assert (fast - exact).norm() / exact.norm() < 5e-3


def test_new_tokens_are_rotated_and_stored_by_one_kernel() -> None:
    assert can_place(DEVICE, torch.bfloat16, 64, False) and can_place(
        DEVICE, torch.bfloat16, 128, True
    )
    compare_placed(DEVICE)


@pytest.mark.parametrize("filtered", [False, True])
def test_triton_sampler_equals_torch(filtered: bool) -> None:
    rows = 70
    vocab = 151_936
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    pick = torch.arange(rows)
    draws = Draws(
        torch.tensor([seed_key((i,)) for i in range(rows)]),
        pick * 37,
        torch.tensor([1.0, 0.5, 0.0, 1.7])[pick % 4],
        torch.where(pick % 3 == 0, 50, -1) if filtered else torch.full((rows,), -1),
        torch.where(pick % 2 == 0, 0.7, 1.0) if filtered else torch.ones(rows),
    )
    want = sample(logits.clone(), draws, filtered)
    found = sample(logits.to(DEVICE), Draws(*(d.to(DEVICE) for d in draws)), filtered).cpu()
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1:], want[1:], atol=2e-5, rtol=1e-5)
    alone = sample(
        logits[5:6].to(DEVICE), Draws(*(d[5:6].to(DEVICE) for d in draws)), filtered
    ).cpu()
    # A row's numbers don't depend on the others
    assert torch.equal(alone[:, 0], found[:, 5])


def test_fp32_on_the_gpu_samples_as_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    want = sampled(engine_of(model_of(0, torch.float32, "cpu"), page_size=256), "cpu", count=8)
    for options in ({}, {"run_ahead": True}):
        found = sampled(engine_of(model_of(0, torch.float32), **options), "gpu", count=8)
        for a, b in zip(found, want, strict=True):
            assert a.tokens == b.tokens
            torch.testing.assert_close(
                torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-4, rtol=0
            )


def test_graphs_change_nothing_and_survive_new_weights() -> None:
    model = model_of(0)
    engines = {graphs: engine_of(model, use_cuda_graphs=graphs) for graphs in (True, False)}
    before = {graphs: sampled(e, "before") for graphs, e in engines.items()}
    change(model, 1)
    for engine in engines.values():
        engine.sync(model)
    after = {graphs: sampled(e, "after") for graphs, e in engines.items()}
    fresh = sampled(engine_of(model, use_cuda_graphs=True), "after")
    for new, old in (
        (before[True], before[False]),
        (after[True], after[False]),
        (after[True], fresh),
    ):
        assert [t.tokens for t in new] == [t.tokens for t in old]
    assert [t.tokens for t in after[True]] != [t.tokens for t in before[True]]
    chunks = engines[True]._worker.chunks
    assert chunks is not None and chunks.recordings is not None
    assert {str(key[0]) for key in chunks.recordings.graphs} == {"decode", "chunks"}  # type: ignore[index]
    turn = after[True][3]
    want = forced(model, prompts(40, 600, CONFIG.vocab)[3] + turn.tokens)[-len(turn.tokens) :].cpu()
    assert (torch.tensor(turn.logp) - want).abs().mean() < GAP, "the graphs run the new weights"


@pytest.mark.parametrize("kernels", ["chosen", "flash", "rope apart", "norms of heads", "fp16"])
def test_gap_to_the_training_forward(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "flash":
        pytest.importorskip("flash_attn")
        monkeypatch.setattr(engine_module, "choose_paged", lambda *_, **__: kernels)
    if kernels == "rope apart":
        monkeypatch.setattr(forward, "can_place", lambda *_: False)
    if kernels == "norms of heads":
        monkeypatch.setitem(
            globals(), "CONFIG", replace(CONFIG, family="qwen3", qkv_bias=False, qk_norm=True)
        )
    narrow = kernels == "fp16"
    model = model_of(2, torch.float16 if narrow else torch.bfloat16)
    turns = sampled(engine_of(model), "gap")
    differences = []
    for turn, prompt in zip(turns, prompts(40, 600, CONFIG.vocab), strict=True):
        want = forced(model, prompt + turn.tokens)[-len(turn.tokens) :].cpu()
        differences.append((torch.tensor(turn.logp) - want).abs())
    assert torch.cat(differences).mean() < (GAP / 5 if narrow else GAP)


def test_sequences_that_come_and_go_draw_as_the_training_forward_says() -> None:
    """Turns of several lengths with texts between them, more sequences than rows, some dropped:
    chunks beside steps that run ahead.
    """
    model = model_of(5)
    rng = random.Random(0)
    heads = prompts(60, 700, CONFIG.vocab, seed=1)
    # Two of four are in groups
    heads = [heads[i % 4] if i % 4 < 2 else prompt for i, prompt in enumerate(heads)]
    scripts = [
        (prompt, prompts(rng.randint(0, 3), 80, CONFIG.vocab, seed=i))
        for i, prompt in enumerate(heads)
    ]
    gaps = []
    for i, turns in hurried(engine_of(model, max_batch_tokens=1024), scripts, rng).items():
        ids = list(scripts[i][0])
        places = []
        for turn, text in zip(turns, [*scripts[i][1], []], strict=False):
            places += range(len(ids), len(ids) + len(turn.tokens))
            ids += [*turn.tokens, *text]
        if turns:
            want = forced(model, ids, params_of(i, 0).temperature).cpu()[torch.tensor(places) - 1]
            gaps.append((torch.tensor([x for turn in turns for x in turn.logp]) - want).abs())
    assert len(gaps) > 50 and torch.cat(gaps).mean() < GAP


def test_deterministic_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As a run with trainer.deterministic does: graphs must record under it
    torch.use_deterministic_algorithms(True)
    try:
        to_the_last_bit()
    finally:
        torch.use_deterministic_algorithms(False)


def to_the_last_bit() -> None:
    model = model_of(3)
    options = {"deterministic": True, "max_num_seqs": 32}
    many = sampled(engine_of(model, **options), "x")
    tight = engine_of(model, **options, kv_bytes=1 << 23)
    assert [(t.tokens, t.logp) for t in sampled(tight, "x")] == [(t.tokens, t.logp) for t in many]
    assert tight.stats.preempted + tight.stats.evicted > 0
    few = sampled(engine_of(model, **options), "x", count=3)
    assert [(t.tokens, t.logp) for t in few] == [(t.tokens, t.logp) for t in many[:3]]


def two_ranks() -> Any:
    mesh = make_mesh()
    model = build_decoder(CONFIG, mesh, ModelOptions())
    change(model, 0)
    engine = Engine(
        CONFIG, mesh.device, EngineOptions(max_num_seqs=24, kv_bytes=1 << 26), mesh.world_group
    )
    engine.sync(model)
    if mesh.rank:
        engine.follow()
        return None
    turns = sampled(engine, "tp", count=10)
    engine.end()
    return [t.tokens for t in turns]


@pytest.mark.first
def test_heads_split_over_two_gpus_with_graphs() -> None:
    need_gpus(2)
    found = run_ranks(two_ranks, 2)[0]
    model = model_of(0)
    want = [t.tokens for t in sampled(engine_of(model), "one", count=10)]
    agree = sum(a == b for x, y in zip(found, want, strict=True) for a, b in zip(x, y, strict=True))
    # bf16 rounds otherwise in another split: a near tie may fall the other way
    assert agree > 0.9 * sum(map(len, want))


@pytest.mark.parametrize(
    "share",
    [{"kv_bytes": 1 << 26}, pytest.param({"kv_bytes": 40 << 30}, marks=pytest.mark.alone)],
    ids=["small cache", "cache of more than 2^32 elements"],
)
def test_samples_of_a_group_share_its_prompt(share: dict[str, int]) -> None:
    """As in training: several samples of a prompt, their pages copied when they part, in a cache
    that takes what there is.
    """
    if torch.cuda.mem_get_info()[0] < share["kv_bytes"] + (4 << 30):
        pytest.skip("needs a GPU with more free memory")
    model = model_of(4)
    asked = prompts(6, 600, CONFIG.vocab)
    engine = engine_of(model, **share)
    for i, prompt in enumerate(asked):
        for k in range(4):
            engine.start(
                (i, k), prompt, SamplingParams(max_tokens=50, temperature=1.0, seed=(i, k)), group=i
            )
    gaps = []
    for key, turn in run(engine).items():
        assert isinstance(key, tuple)
        want = forced(model, asked[key[0]] + list(turn.tokens))[-len(turn.tokens) :].cpu()
        gaps.append((torch.tensor(turn.logp) - want).abs())
    assert len(gaps) == 24 and torch.cat(gaps).mean() < GAP


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
def test_the_kernel_of_every_head_dimension_is_right_or_passed_over(head_dim: int) -> None:
    """Whatever flash-attn was built for: what is chosen agrees with fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = choose_backend(DEVICE, torch.bfloat16, head_dim)
        paged = choose_paged(DEVICE, torch.bfloat16, head_dim, 256)
    assert backend == "reference" or kernel_error(backend, DEVICE, torch.bfloat16, head_dim) < 0.01
    assert paged != "torch" or head_dim == 96, "ours take the others"
    assert paged == "torch" or paged_error(paged, DEVICE, torch.bfloat16, head_dim, 256) < 0.01


def test_copying_pages_does_not_wait_for_the_device() -> None:
    cache = KVCache((2, 16, 1, 8), 100, torch.bfloat16, DEVICE)
    cache.data.normal_()
    want = cache.data.clone()
    pairs = [(1 + i % 9, 10 + i) for i in range(80)]
    for source, target in pairs:
        want[:, target] = want[:, source]
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.copy(pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(cache.data, want)
