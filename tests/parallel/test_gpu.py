"""Sharding and sequence parallelism on CUDA: streams, shared buffers, compiled blocks and
recomputation give the CPU's numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retool import optim
from retool.batch import Sample, pack
from retool.model import recompute
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import local_pieces, shard
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step
from tests.ranks import need_gpus, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
STEPS = 4


def config(tied: bool) -> ModelConfig:
    return ModelConfig(
        "qwen2",
        vocab=1009,
        hidden=256,
        ffn=512,
        layers=6,
        heads=14,
        kv_heads=2,
        head_dim=64,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        tied=tied,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_position=0,
    )


def train(
    device: str,
    sp: int,
    tied: bool,
    dtype: torch.dtype,
    more: dict[str, Any],
    check_sync: bool = False,
) -> dict[str, Any]:
    """Losses, norms and this rank's weights after a few steps of two micro-batches."""
    mesh = make_mesh(sp=sp, device=device)
    torch.backends.cuda.matmul.allow_tf32 = False
    offload = more.pop("offload", False) if "offload" in more else False
    if offload:
        optim.OFFLOAD_CHUNK_NUMEL = 1 << 16  # so that all three slots are used, and again
    if "chunk" in more:
        recompute.CHUNKED_FROM = recompute.CHUNK = more.pop("chunk")
    options = ModelOptions(param_dtype=dtype, use_compile=more.pop("use_compile", "auto"), **more)
    model = build_decoder(config(tied), mesh, options)
    generator = torch.Generator().manual_seed(0)
    weights = {
        m.name: torch.randn(m.shape, generator=generator) * 0.05 for _, m in model.layout.members
    }
    for p in local_pieces(model.layout, mesh.shard_rank):
        model.master[p.local : p.local + p.stop - p.start] = (
            weights[p.member.name].flatten()[p.start : p.stop].to(mesh.device)
        )
    model.refresh()
    optimizer = AdamW(model, AdamWOptions(), offload, offload)
    rng = np.random.default_rng(0)
    losses = []
    norms = []
    for step in range(STEPS):
        packs = []
        for _ in range(4):
            lengths = rng.integers(1, 200, 6)
            packs.append(
                pack(
                    [
                        Sample(rng.integers(0, 1009, n).astype(np.int32), rng.random(n) < 0.6)
                        for n in lengths
                    ],
                    multiple=12,
                )
            )
        mine = packs[mesh.dp_rank :: mesh.dp]
        strict = check_sync and step == STEPS - 1
        if strict:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        measured = train_step(
            model,
            optimizer,
            mine,
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


def joined(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for (name, start), values in result["weights"].items():
            pieces.setdefault(name, {})[start] = values
    return {
        name: np.concatenate([parts[k] for k in sorted(parts)]) for name, parts in pieces.items()
    }


@pytest.fixture(scope="module")
def expected() -> dict[bool, dict[str, Any]]:
    return {tied: train("cpu", 1, tied, torch.float32, {}) for tied in (True, False)}


# GPUs, sp, tied, options: every way in which a gathered buffer is refilled under autograd
CASES = [
    (1, 1, True, {}),
    (1, 1, False, {"recompute": "full"}),
    (2, 1, True, {"recompute": "none"}),
    (2, 2, True, {"recompute": "full"}),
    (2, 2, False, {"recompute": "selective"}),
    (1, 1, True, {"recompute": "offload"}),
    (2, 2, False, {"recompute": "offload", "chunk": 128}),
    (2, 1, False, {"forward_prefetch": False, "use_compile": False}),
    (2, 2, True, {"reshard_after_forward": False}),
    (2, 1, False, {"keep_copy": False}),
    (2, 1, True, {"offload": True}),
]


@pytest.mark.parametrize(("gpus", "sp", "tied", "more"), CASES)
def test_fp32_on_gpus_trains_as_the_cpu(
    expected: dict[bool, dict[str, Any]], gpus: int, sp: int, tied: bool, more: dict[str, Any]
) -> None:
    need_gpus(gpus)
    results = run_ranks(train, gpus, "cuda", sp, tied, torch.float32, dict(more))
    want = expected[tied]
    for result in results:
        np.testing.assert_allclose(result["losses"], want["losses"], rtol=2e-5)
        np.testing.assert_allclose(result["norms"], want["norms"], rtol=2e-4)
    found = joined(results)
    wanted = joined([want])
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) <= 2e-3 * np.linalg.norm(value), name


BF16 = torch.bfloat16
FP16 = torch.float16


@pytest.mark.parametrize(
    ("gpus", "sp", "dtype", "more"),
    [
        (1, 1, BF16, {}),
        (2, 2, BF16, {"recompute": "full"}),
        (1, 1, BF16, {"recompute": "offload", "chunk": 128}),
        (2, 1, BF16, {}),
        (2, 1, BF16, {"keep_copy": False}),
        (1, 1, FP16, {}),
        (2, 2, FP16, {"recompute": "full"}),
    ],
)
def test_narrow_dtypes_on_gpus_train_like_fp32_and_never_wait(
    expected: dict[bool, dict[str, Any]],
    gpus: int,
    sp: int,
    dtype: torch.dtype,
    more: dict[str, Any],
) -> None:
    """The last step runs with every host synchronisation an error."""
    need_gpus(gpus)
    results = run_ranks(train, gpus, "cuda", sp, True, dtype, dict(more), True)
    np.testing.assert_allclose(results[0]["losses"], expected[True]["losses"], rtol=2e-3)
    np.testing.assert_allclose(results[0]["norms"], expected[True]["norms"], rtol=3e-2)


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
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).sum().backward()
    return sharded, torch.cuda.max_memory_allocated() - before, model.planned_bytes()


def test_peak_is_the_formula() -> None:
    """That of tests/parallel/test_sharded_memory.py, by CUDA's allocator."""
    need_gpus(2)
    layers = 8
    width = 2048
    rows = 1024
    for sharded, backward, planned in run_ranks(measured, 2, layers, width, rows):
        assert sharded == pytest.approx(planned, rel=1e-3)
        unit = width * width
        expected = layers * rows * width * 2 + 2 * unit + max(0, 2 * unit - rows * width * 2)
        assert backward == pytest.approx(expected, rel=0.02)
