"""Every order that the streams of sharding, offloading and the optimizer need is there; and without
any of them it is missed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from retool import optim
from retool.batch import Sample, pack
from retool.model import offload
from retool.model.build import ModelOptions, build_decoder
from retool.model.decoder import Decoder
from retool.model.offload import Offload, Parked
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.fsdp.overlap import Overlap, Pending
from retool.parallel.fsdp.reduce import Gradients
from retool.parallel.fsdp.unit import Unit
from retool.parallel.mesh import make_mesh
from tests.model.decoders import decoder_config
from tests.parallel.streams import Event, Stream, Unordered, watched
from tests.parallel.test_modules import data, made
from tests.ranks import run_ranks

# ── sharding, on two ranks
# ──────────────────────────────────────────────────────────────────────────────────────


def step(case: str, more: dict[str, Any], hold: bool) -> None:
    """Two steps of three micro-batches each, and an evaluation after each."""
    with watched():
        module, units, loss = made(case)
        dtypes = {
            "param_dtype": torch.float64,
            "master_dtype": torch.float64,
            "reduce_dtype": torch.float64,
            **more,
        }
        model = shard(module.to(dtypes["param_dtype"]), units, make_mesh(), **dtypes)
        optimizer = AdamW(model, AdamWOptions())
        for _ in range(2):
            model.zero_grad()
            for number, x in enumerate(data().flatten(0, 1)[:3].to(dtypes["param_dtype"])):
                with model.no_sync() if hold and number < 2 else nullcontext():
                    loss(model, x).backward()
            optimizer.step(1e-3)
            with torch.no_grad():
                loss(model, x)


CASES = (
    "twice",
    "sometimes",
    "nested",
    "around another of its unit",
    "towers",
    "towers checkpointed",
    "images",
    "gpt2 checkpointed",
)
# By default the first options go through all cases, the others through what is hardest.
HARD = ("sometimes", "nested", "towers checkpointed")


def steps(cases: tuple[str, ...], more: dict[str, Any], hold: bool) -> None:
    for case in cases:
        step(case, more, hold)


# What gradients are reduced in is wider than they are
NARROW: dict[str, Any] = {
    "param_dtype": torch.bfloat16,
    "master_dtype": torch.float32,
    "reduce_dtype": torch.float32,
}
OPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({}, True),
    ({"reshard_after_forward": False}, False),
    ({"forward_prefetch": False, "backward_overlap": False}, True),
    ({"param_dtype": torch.float32, "keep_copy": False, "reduce_dtype": torch.bfloat16}, True),
    (NARROW, False),
]


# The last one's orders are checked by `test_sharded_memory`, too
@pytest.mark.parametrize(("more", "hold"), OPTIONS[:-1])
def test_sharding(more: dict[str, Any], hold: bool) -> None:
    run_ranks(steps, 2, HARD if more or hold else CASES, more, hold)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "hold"), OPTIONS[1:])
def test_sharding_of_every_case(more: dict[str, Any], hold: bool) -> None:
    run_ranks(steps, 2, CASES, more, hold)


def replicated(fsdp_size: int, hold: bool) -> None:
    """A step of two micro-batches, whose gradients are added up over replicas."""
    with watched():
        module, units, loss = made("twice")
        model = shard(module.float(), units, make_mesh(fsdp_size=fsdp_size))
        optimizer = AdamW(model, AdamWOptions())
        first, second, *_ = data().flatten(0, 1).bfloat16()
        with model.no_sync() if hold else nullcontext():
            loss(model, first).backward()
        with model.last_backward():
            loss(model, second).backward()
        optimizer.step(1e-3)


BROKEN_SUMS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a sum over replicas doesn't wait for the reduction": (Stream, "wait_stream", lambda *_: None),
    "the optimizer doesn't wait for the sums": (Gradients, "wait", Gradients.settle),
}


def replicas(fsdp_size: int) -> list[str]:
    """Which of the broken orders are noticed."""
    replicated(fsdp_size, True)
    found = []
    for name, (place, method, instead) in BROKEN_SUMS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, method, instead)
            try:
                replicated(fsdp_size, False)
            except Unordered:
                found.append(name)
    return found


@pytest.mark.parametrize(
    ("ranks", "fsdp_size"), [(4, 2), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_each_order_of_replicas_is_needed(ranks: int, fsdp_size: int) -> None:
    for found in run_ranks(replicas, ranks, fsdp_size):
        assert found == list(BROKEN_SUMS)


def released_unseen(unit: Unit) -> None:
    unit.weights.in_use = None


def unmarked(unit: Unit) -> None:
    """`gather` as it would be without a release of what is in use."""
    unit.weights.in_use = None
    unit.start_gather()
    unit.weights.settle()


def at_once(overlap: Overlap, flat: torch.Tensor, into: torch.Tensor, group: Any) -> Pending:
    """`reduce` that doesn't wait for what it reduces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "wait_stream", lambda *_: None)
        return REDUCE(overlap, flat, into, group)


def parts_at_once(overlap: Overlap, *args: Any) -> Pending:
    """`reduce_parts` that doesn't wait for what it reduces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "wait_stream", lambda *_: None)
        return REDUCE_PARTS(overlap, *args)


REDUCE = Overlap.reduce
REDUCE_PARTS = Overlap.reduce_parts
BROKEN: dict[str, tuple[str, type, str, Callable[..., Any]]] = {  # case, what is replaced, by what
    "a gather doesn't wait for the last use": ("sometimes", Unit, "release", released_unseen),
    "a gather doesn't wait for a use whose end isn't seen": ("towers", Unit, "gather", unmarked),
    "a use doesn't wait for the gather": ("twice", Pending, "wait", lambda _: None),
    "a gather doesn't wait for new weights": (
        "twice",
        Overlap,
        "follow_new_weights",
        lambda _: None,
    ),
    "a reduction doesn't wait for the gradients": ("twice", Overlap, "reduce", at_once),
    "parts are sent before the gradients are there": (
        "twice",
        Overlap,
        "reduce_parts",
        parts_at_once,
    ),
    "the optimizer doesn't wait for the reductions": (
        "twice",
        Gradients,
        "settle",
        lambda _: None,
    ),
}


def found_out() -> list[str]:
    """Which of the broken orders are noticed; each is broken on both ranks in turn."""
    found = []
    for name, (case, place, method, instead) in BROKEN.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, method, instead)
            try:
                step(case, NARROW if method == "reduce_parts" else {}, False)
            except Unordered:
                found.append(name)
    return found


def test_each_order_of_sharding_is_needed() -> None:
    for found in run_ranks(found_out, 2):
        assert found == list(BROKEN)


def released() -> list[bool]:
    """Whether the end of each unit's last use was noted, for whoever takes its buffer."""
    with watched():
        noted = []
        wide = {"param_dtype": torch.float64, "master_dtype": torch.float64}
        for reshard in (True, False):
            module, units, loss = made("twice")
            model = shard(module, units, make_mesh(), **wide, reshard_after_forward=reshard)
            loss(model, data().flatten(0, 1)[0]).backward()
            noted.append(any(buffer.free is not None for buffer in model.buffers))
    return noted


def test_a_buffer_of_one_units_own_waits_for_nobody() -> None:
    assert run_ranks(released, 2) == [[True, False]] * 2


# ── activations in host memory, and offloaded optimizer state, in one process
# ───────────────────────────────────

CONFIG = decoder_config(4, 2, vocab=31, hidden=16, ffn=24, layers=5, head_dim=4, tied=True)


def offloading(monkeypatch: pytest.MonkeyPatch, parked: int | None = None) -> Sharded:
    """A decoder whose blocks' activations are copied on a stream of their own, into pages of 1,000
    bytes.
    """
    monkeypatch.setattr(offload, "PAGE", 1000)
    monkeypatch.setattr(
        Offload,
        "_page",
        lambda self: self.free.pop() if self.free else torch.empty(1000, dtype=torch.uint8),
    )
    model = build_decoder(CONFIG, make_mesh(), ModelOptions(recompute="offload", parked=parked))
    model.master.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    model.refresh()
    store(model).stream = Stream()  # type: ignore[assignment]
    return model


def store(model: Sharded) -> Offload:
    assert isinstance(model.module, Decoder) and model.module.execution.offload is not None
    return model.module.execution.offload


def loss(model: Sharded, tokens: int) -> torch.Tensor:
    sample = Sample(np.arange(tokens, dtype=np.int32) % 31, np.ones(tokens, bool))
    return model(pack([sample]), lambda hidden, weight: (hidden @ weight.t()).tanh().sum())


@pytest.mark.parametrize("parked", [None, 2])
def test_offloading_activations(monkeypatch: pytest.MonkeyPatch, parked: int | None) -> None:
    """Packs of several lengths, two graphs at once, and a forward and a backward that are given up
    on.
    """
    with watched() as streams:
        model = offloading(monkeypatch, parked)
        for tokens in (40, 13, 55):
            loss(model, tokens).backward()
        for value in [loss(model, 40), loss(model, 21)]:
            value.backward()
        del value
        loss(model, 30)
        given_up(model)
        for _ in range(2):
            loss(model, 40).backward()
    assert streams.operations > 1000


def given_up(model: Sharded) -> None:
    """A backward that ends before it has used what is being fetched."""
    # type: ignore[union-attr]
    attend = type(model.module.blocks[2]).attend
    calls = [0]

    def fails(block: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:  # of the backward: a forward saves the result, too
            raise ZeroDivisionError
        return attend(block, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.module.blocks[2]), "attend", fails)  # type: ignore[union-attr]
        with pytest.raises(ZeroDivisionError):
            loss(model, 30).backward()


def sharded_and_offloading() -> int:
    """All streams at once: two ranks, gathers, reductions and parked activations."""
    with pytest.MonkeyPatch.context() as patch, watched() as streams:
        model = offloading(patch)
        optimizer = AdamW(model, AdamWOptions())
        for tokens in (40, 13):
            model.zero_grad()
            for _ in range(2):
                loss(model, tokens).backward()
            optimizer.step(1e-3)
    return streams.operations


def test_offloading_activations_of_sharded_blocks() -> None:
    assert min(run_ranks(sharded_and_offloading, 2)) > 1000


def forgotten(offload: Offload) -> None:
    """`settle` that lets go without waiting."""
    offload.held = []
    offload.done = None


BROKEN_OFFLOAD: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "nothing waits for a copy": (Offload, "settle", forgotten),
    "a copy doesn't wait for what it copies": (Stream, "wait_stream", lambda *_: None),
    "what is used hasn't arrived": (Parked, "fetch", lambda parked: parked.start_fetch()),
}


@pytest.mark.parametrize("name", BROKEN_OFFLOAD)
def test_each_order_of_offloading_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with watched():
        model = offloading(monkeypatch)
        monkeypatch.setattr(*BROKEN_OFFLOAD[name])
        with pytest.raises(Unordered):
            for _ in range(2):
                loss(model, 40).backward()


def offloaded_steps(monkeypatch: pytest.MonkeyPatch, master: bool, moments: bool) -> None:
    """Three updates in chunks of 300 elements, of which more than three fit; what is away is
    ordinary memory here.
    """
    monkeypatch.setattr(optim, "OFFLOAD_CHUNK_NUMEL", 300)
    with watched():
        module, units, loss_of = made("twice")
        model = shard(
            module,
            units,
            make_mesh(),
            param_dtype=torch.float32 if master else torch.float64,
            master_dtype=torch.float64,
            reduce_dtype=torch.float64,
        )
        optimizer = AdamW(model, AdamWOptions())
        optimizer.offload_master = master
        optimizer.offload_moments = moments
        for x in data().flatten(0, 1)[:3].to(model.param_dtype):
            model.zero_grad()
            loss_of(model, x).backward()
            optimizer.step(1e-3)
            model.master.sum(), optimizer.exp_avg.sum()


@pytest.mark.parametrize(("master", "moments"), [(True, True), (True, False), (False, True)])
def test_an_offloaded_update(monkeypatch: pytest.MonkeyPatch, master: bool, moments: bool) -> None:
    offloaded_steps(monkeypatch, master, moments)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_each_order_of_an_offloaded_update_is_needed(
    monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Of every three waits only one is left: for the slot, for the arrival, for the update."""
    waits = [0]
    wait = Stream.wait_event

    def some(stream: Stream, event: Event) -> None:
        waits[0] += 1
        if waits[0] % 3 == kept:
            wait(stream, event)

    monkeypatch.setattr(Stream, "wait_event", some)
    with pytest.raises(Unordered):
        offloaded_steps(monkeypatch, True, True)
