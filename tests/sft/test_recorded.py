"""Recorded micro-batches, on a CPU with what a CUDA graph does: the same operations again on the same
tensors, and no Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retool.batch import PackedBatch
from retool.data.loader import StepOrder, step_batch
from retool.data.packing import TOKENS_OF_A_DOCUMENT, Budget, Packing, recorded_size, shared_room
from retool.model import build
from retool.model.attention import dispatch
from retool.model.attention.reference import Pack
from retool.model.build import ModelOptions, build_decoder
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.recording import Record, Work, come_to_rest
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft import loss, step
from retool.sft import train as run
from retool.sft.__main__ import main
from retool.sft.recorded import SmallPacks
from retool.sft.step import train_step
from tests.model.decoders import decoder_config
from tests.ranks import run_ranks
from tests.sft.rows import Rows
from tests.sft.test_command import words

STEPS = 4  # of two micro-batches: the third of a size is recorded


class Operations(TorchDispatchMode):
    """Every operation with its tensors, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(out), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors(out: Any) -> list[Tensor]:
    found = out if isinstance(out, (tuple, list)) else [out]
    return [each for each in found if isinstance(each, Tensor)]


@contextmanager
def as_recorded(model: Sharded) -> Iterator[None]:
    """Python runs once where a graph is recorded, and nothing is computed."""
    held = [unit.gradients.held for unit in model.units]
    kept = [model.grad, *(buffer.data for buffer in held if buffer is not None)]
    before = [x.clone() for x in kept]
    try:
        yield
        come_to_rest(model)
    finally:
        for x, value in zip(kept, before, strict=True):
            x.copy_(value)


def record(work: Work, model: Sharded) -> Work:
    operations = Operations()
    with as_recorded(model), operations:
        result = work()

    def replay() -> Tensor:
        operations.replay()
        return result

    return replay


def record_python(work: Work, model: Sharded) -> Work:
    """For ranks: their collectives are no operations that could be run again."""
    with as_recorded(model):
        work()
    return work


def scores(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """Attention that reads the documents from where a kernel does."""
    tokens, heads, dim = q.shape
    place = torch.arange(tokens)
    document = torch.bucketize(place, pack.cu_seqlens[1:], right=True)
    hidden = (document[:, None] != document) | (place[:, None] < place)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    x_NTT = torch.einsum("tnh,snh->nts", q, k) * dim**-0.5
    x_NTT = x_NTT.masked_fill(hidden, -torch.inf)
    return torch.einsum("nts,snh->tnh", x_NTT.softmax(-1), v), x_NTT.logsumexp(-1)


def score_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack
) -> tuple[Tensor, ...]:
    del out, lse
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(scores(q, k, v, pack)[0], (q, k, v), dout)


@contextmanager
def attention_by_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.FORWARD, "masked", scores)
        patch.setitem(dispatch.BACKWARD, "masked", score_gradients)
        patch.setattr(build, "choose_backend", lambda *_, **__: "masked")
        yield


def train(recorder: Record | None, sp: int = 1, hold: bool = False) -> list[Any]:
    """Losses and gradient norms of a few steps of two micro-batches, and this rank's weights."""
    with attention_by_device():
        mesh = make_mesh(sp=sp)
        f64 = torch.float64
        model = build_decoder(decoder_config(4, 2, "qwen2"), mesh, ModelOptions(f64, f64, f64))
        values = torch.Generator().manual_seed(mesh.shard_rank)
        model.master.normal_(0, 0.2, generator=values)
        model.refresh()
        optimizer = AdamW(model, AdamWOptions())
        small = None if recorder is None else SmallPacks(model, 256, recorder)
        found: list[Any] = []
        for step in range(STEPS):
            batch = step_batch(
                step, Rows(20, 40), StepOrder(8, 0), packing(mesh.dp_rank, mesh.dp, sp)
            )
            timer = StepTimer(mesh.device)
            packs = batch.micro_batches
            measured = train_step(
                model, optimizer, packs, batch.trained_tokens, 1e-2, timer, hold, small=small
            )
            found.extend(measured.read()[:2])
            assert small is None or all(map(small.takes, packs))
        if small is not None:
            assert bool(small.recordings.made) != small.recordings.fails
        return [*found, model.master.numpy().copy()]


def packing(dp_rank: int, dp: int, sp: int) -> Packing:
    return Packing(Budget(micro_batch_size=4 // dp), dp_rank, dp, sp, recorded=True)


def test_recorded_steps_train_as_others_do() -> None:
    for want, got in zip(train(None), train(record), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def break_off(work: Work, model: Sharded) -> Work:
    """In the middle of the backward, as where an operation can't be recorded."""
    with as_recorded(model), pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.BACKWARD, "masked", scores)
        work()
    return work


def test_what_cannot_be_recorded_runs_as_ever() -> None:
    with pytest.warns(UserWarning, match="small micro-batches aren't recorded here.*positional"):
        found = train(break_off)
    for want, got in zip(train(None), found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class Watched(torch.autograd.Function):
    """Identity; `node` lives as long as the graph does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, node: object) -> Tensor:
        ctx.node = node
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return *grads, None


def test_a_small_micro_batch_finds_no_graph_of_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would hold where its gradients go, and with them the stream of the run before: torch
    says that this breaks a recording.
    """
    graphs = list[weakref.ref[Operations]]()

    def loss_sum(model: Sharded, batch: PackedBatch) -> Tensor:
        node = Operations()
        graphs.append(weakref.ref(node))
        return Watched.apply(loss.loss_sum(model, batch), node)

    monkeypatch.setattr(step, "loss_sum", loss_sum)
    mesh = make_mesh()
    model = build_decoder(decoder_config(4, 2, "qwen2"), mesh, ModelOptions())
    small = SmallPacks(model, 0)
    alive = list[bool]()

    def run(*_: Any) -> Tensor:
        alive.extend(graph() is not None for graph in graphs)
        return torch.zeros(())

    monkeypatch.setattr(small, "run", run)
    monkeypatch.setattr(small, "takes", lambda _: len(graphs) == 2)
    batch = step_batch(0, Rows(20, 40), StepOrder(12, 0), packing(0, 1, 1))
    optimizer = AdamW(model, AdamWOptions())
    timer = StepTimer(mesh.device)
    train_step(model, optimizer, batch.micro_batches, batch.trained_tokens, 0, timer, small=small)
    assert alive == [False, False]


def test_an_error_leaves_nothing_recorded(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback holds the frames that hold it, and NCCL can't end before its graphs."""
    made = list[dict[str, str]]()

    def out_of_luck(*_: Any, small: SmallPacks, **__: Any) -> None:
        recorded: Any = small.recordings.made
        recorded["of a size"] = "a graph"
        made.append(recorded)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(run, "records", lambda _: True)
    monkeypatch.setattr(run, "train_step", out_of_luck)
    with pytest.raises(RuntimeError, match="out of luck"):
        main(words(work, tmp_path / "run"))
    assert made == [{}]


def train_twice(sp: int, hold: bool) -> list[list[Any]]:
    return [train(recorder, sp, hold) for recorder in (None, record_python)]


@pytest.mark.parametrize(
    "sp, hold",
    [(1, True), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, False), (2, True)))],
)
def test_recorded_steps_train_as_others_do_on_two_ranks(sp: int, hold: bool) -> None:
    """What is gathered, held and reduced before and after a recording is as without one."""
    for want, got in run_ranks(train_twice, 2, sp, hold):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_room_is_looked_for_where_small_micro_batches_are_recorded() -> None:
    """It is work for each rank of a run, and on the thread that the next packs come from."""
    for recorded in (True, False):
        asked = replace(packing(1, 2, 2), recorded=recorded)
        packs = step_batch(0, Rows(20, 40), StepOrder(8, 0), asked).micro_batches
        assert all((pack.room > 0) == recorded for pack in packs)


def test_a_micro_batch_has_one_room_on_all_ranks() -> None:
    packing = Packing(Budget(max_tokens_per_gpu=500, few_tokens=300), dp=2)
    assert shared_room([[160, 30], [20]], packing) == 190
    # Many documents need room for their edges
    assert shared_room([[2] * 8, [20]], packing) == 10 * TOKENS_OF_A_DOCUMENT
    assert shared_room([[160, 141], [20]], packing) == 0
    divided = replace(packing, sp=2, keep_whole=False)
    assert shared_room([[160, 30], [20, 20]], divided) == 0
    # A rank with nothing to do runs a pack of one token
    assert shared_room([[20], []], packing) > 0
    sizes = {recorded_size(room) for room in range(1, 2049)}
    assert sizes == {128, 256, 384, *range(512, 2049, 256)}
    assert all(room <= recorded_size(room) for room in range(1, 2049))
