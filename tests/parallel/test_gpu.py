"""Sharding and sequence parallelism on CUDA: streams, shared buffers, compiled blocks and
recomputation give the CPU's numbers.

All cases of so many GPUs and so wide numbers run in the same processes: they connect once, and what
one has compiled the next ones use, where their blocks compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from retool import optim
from retool.batch import PackedBatch, Sample, pack
from retool.model import recompute
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig
from retool.optim import AdamW, AdamWOptions
from retool.parallel import collectives
from retool.parallel.fsdp import local_pieces, shard
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step
from tests.model.decoders import decoder_config
from tests.ranks import need_gpus, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
STEPS = 4


def config(tied: bool) -> ModelConfig:
    return decoder_config(14, 2, vocab=1009, hidden=256, ffn=512, layers=6, head_dim=64, tied=tied)


@dataclass(frozen=True)
class Case:
    """A model trained on so many GPUs. `strict`: the last step waits for no GPU. `each_to_each`: gradients
    travel as those of a large model do.
    """

    gpus: int
    sp: int
    tied: bool = True
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    optimizer_offload: bool = False
    chunk: int = 0
    strict: bool = False
    shards: int = -1
    each_to_each: bool = False

    @property
    def group(self) -> tuple[int, bool]:
        """The same of cases that share their processes."""
        return self.gpus, self.dtype is torch.float32

    def __str__(self) -> str:
        said = [f"{self.gpus} gpus", f"sp {self.sp}", "tied" if self.tied else "untied"]
        said += [f"{name} {value}" for name, value in self.options.items()]
        said += ["optimizer offload"] * self.optimizer_offload
        said += [f"chunks of {self.chunk}"] * bool(self.chunk)
        said += ["replicas"] * (self.shards > 0)
        said += ["each to each"] * self.each_to_each
        return ", ".join([*said, str(self.dtype).removeprefix("torch.")])


@functools.cache
def mesh_of(device: str, sp: int, shards: int) -> Mesh:
    """Its groups connect once."""
    return make_mesh(sp=sp, fsdp_size=shards, device=device)


def train(device: str, case: Case) -> dict[str, Any]:
    """Losses, norms and this rank's weights after a few steps of two micro-batches."""
    mesh = mesh_of(device, case.sp, case.shards)
    torch.backends.cuda.matmul.allow_tf32 = False
    options = ModelOptions(param_dtype=case.dtype, **{"use_compile": "auto", **case.options})
    model = build_decoder(config(case.tied), mesh, options)
    generator = torch.Generator().manual_seed(0)
    weights = {
        m.name: torch.randn(m.shape, generator=generator) * 0.05 for _, m in model.layout.members
    }
    for p in local_pieces(model.layout, mesh.shard_rank):
        model.master[p.local : p.local + p.stop - p.start] = (
            weights[p.member.name].flatten()[p.start : p.stop].to(mesh.device)
        )
    model.refresh()
    offload = case.optimizer_offload
    optimizer = AdamW(model, AdamWOptions(), offload, offload)
    rng = np.random.default_rng(0)
    losses = []
    norms = []
    for step in range(STEPS):
        packs = [draw_pack(rng) for _ in range(4)]
        strict = case.strict and step == STEPS - 1
        if strict:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        measured = train_step(
            model,
            optimizer,
            packs[mesh.dp_rank :: mesh.dp],
            sum(p.trained_tokens for p in packs),
            1e-3,
            StepTimer(mesh.device),
        )
        if strict:
            torch.cuda.set_sync_debug_mode("default")
        loss, norm, skipped = measured.read()
        assert not skipped
        losses.append(loss)
        norms.append(norm)
    owned = {
        (p.member.name, p.start): model.master[p.local : p.local + p.stop - p.start].cpu().numpy()
        for p in local_pieces(model.layout, mesh.shard_rank)
    }
    return {"losses": losses, "norms": norms, "weights": owned}


def draw_pack(rng: np.random.Generator) -> PackedBatch:
    lengths = rng.integers(1, 200, 6)
    samples = [
        Sample(rng.integers(0, 1009, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths
    ]
    return pack(samples, multiple=12)


def train_each(cases: list[Case]) -> list[dict[str, Any]]:
    """In a rank: one case after the other, as several models of one process."""
    found = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            if case.optimizer_offload:
                # so small that all three slots are used, and again
                patch.setattr(optim, "OFFLOAD_CHUNK_NUMEL", 1 << 16)
            if case.each_to_each:
                patch.setattr(collectives, "LARGE_BYTES", 1)
            if case.chunk:
                patch.setattr(recompute, "CHUNKED_FROM", case.chunk)
                patch.setattr(recompute, "CHUNK", case.chunk)
            try:
                found.append(train("cuda", case))
            except BaseException as error:
                raise AssertionError(f"in the case: {case}") from error
    return found


Trained = Callable[[Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> Trained:
    """A case's results by rank; the first question trains all of this run's cases of its group."""
    chosen = {
        id(item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
    }

    @functools.cache
    def of(group: tuple[int, bool]) -> dict[int, list[dict[str, Any]]]:
        cases = [c for c in (*FP32_CASES, *NARROW_CASES) if c.group == group and id(c) in chosen]
        ranks = run_ranks(train_each, cases[0].gpus, cases, timeout=280)
        return {id(case): [rank[i] for rank in ranks] for i, case in enumerate(cases)}

    return lambda case: of(case.group)[id(case)]


def joined(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for (name, start), values in result["weights"].items():
            pieces.setdefault(name, {})[start] = values
    return {
        name: np.concatenate([parts[k] for k in sorted(parts)]) for name, parts in pieces.items()
    }


Expected = dict[bool, Future[dict[str, Any]]]


@pytest.fixture(scope="module")
def expected() -> Iterator[Expected]:
    """What the CPU trains, by whether the head is tied; it does so while the GPUs do."""
    with ThreadPoolExecutor(1) as pool:
        yield {tied: pool.submit(train, "cpu", Case(1, 1, tied)) for tied in (True, False)}


# Every way in which a gathered buffer is refilled under autograd.
FP32_CASES = [
    Case(1, 1),
    Case(1, 1, tied=False, options={"recompute": "full"}),
    Case(2, 1, options={"recompute": "none"}),
    Case(2, 2, options={"recompute": "full"}),
    Case(2, 2, tied=False, options={"recompute": "selective"}),
    Case(1, 1, options={"recompute": "offload"}),
    Case(2, 2, tied=False, options={"recompute": "offload"}, chunk=128),
    Case(2, 1, tied=False, options={"forward_prefetch": False, "use_compile": False}),
    Case(2, 2, options={"reshard_after_forward": False}),
    Case(2, 1, tied=False, options={"keep_copy": False}),
    Case(2, 1, optimizer_offload=True),
    Case(2, 1, shards=1),
]


@pytest.mark.first
@pytest.mark.parametrize("case", FP32_CASES, ids=str)
def test_fp32_on_gpus_trains_as_the_cpu(expected: Expected, trained: Trained, case: Case) -> None:
    need_gpus(case.gpus)
    results = trained(case)
    want = expected[case.tied].result()
    for result in results:
        np.testing.assert_allclose(result["losses"], want["losses"], rtol=2e-5)
        np.testing.assert_allclose(result["norms"], want["norms"], rtol=2e-4)
    found = joined(results)
    wanted = joined([want])
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) <= 2e-3 * np.linalg.norm(value), name


BF16 = torch.bfloat16
FP16 = torch.float16
NARROW_CASES = [
    Case(1, 1, dtype=BF16, strict=True),
    Case(2, 2, dtype=BF16, options={"recompute": "full"}, strict=True),
    Case(1, 1, dtype=BF16, options={"recompute": "offload"}, chunk=128, strict=True),
    Case(2, 1, dtype=BF16, strict=True),
    Case(2, 1, dtype=BF16, options={"keep_copy": False}, strict=True),
    Case(2, 1, dtype=BF16, shards=1, strict=True),
    Case(2, 1, dtype=BF16, each_to_each=True, strict=True),
    Case(1, 1, dtype=FP16, strict=True),
    Case(2, 2, dtype=FP16, options={"recompute": "full"}, strict=True),
]


@pytest.mark.first
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_narrow_dtypes_on_gpus_train_like_fp32_and_never_wait(
    expected: Expected, trained: Trained, case: Case
) -> None:
    """The last step runs with every host synchronisation an error."""
    need_gpus(case.gpus)
    found = trained(case)[0]
    want = expected[True].result()
    np.testing.assert_allclose(found["losses"], want["losses"], rtol=2e-3)
    np.testing.assert_allclose(found["norms"], want["norms"], rtol=3e-2)


def measured(layers: int, width: int, rows: int) -> tuple[int, int, int]:
    """Bytes that the allocator says: of sharding, and of a backward beside what was there; and what
    is planned.
    """
    mesh = make_mesh(device="cuda")
    net = torch.nn.Sequential(
        *(torch.nn.Linear(width, width, bias=False, device="meta") for _ in range(layers))
    )
    start = torch.cuda.memory_allocated()
    model = shard(net, [(f"{i}", [unit]) for i, unit in enumerate(net)], mesh)
    sharded = torch.cuda.memory_allocated() - start
    x = torch.ones(rows, width, dtype=torch.bfloat16, device=mesh.device)
    before = start
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).sum().backward()
    return sharded, torch.cuda.max_memory_allocated() - before, model.planned_bytes()


def test_peak_is_the_formula() -> None:
    """That of tests/parallel/test_sharded_memory.py, by CUDA's allocator, and what cuBLAS wants: the sum's
    gradient is one number for all of its places, and is written out for the last unit's products.
    """
    need_gpus(2)
    layers = 8
    width = 2048
    rows = 1024
    for sharded, backward, planned in run_ranks(measured, 2, layers, width, rows):
        assert sharded == pytest.approx(planned, rel=1e-3)
        unit = width * width
        activation = rows * width * 2
        # What arrives of a gradient has its place in the buffers: the sum takes no more
        expected = layers * activation + 2 * unit + activation
        assert backward == pytest.approx(expected, rel=0.02)
