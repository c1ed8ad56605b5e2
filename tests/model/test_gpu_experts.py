"""Mixtures of experts on CUDA: the grouped kernel, a training step, sampling and router replay,
against the CPU or float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.packing import Budget
from retool.engine import Engine, EngineOptions, SamplingParams
from retool.model.build import ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.model.decoder import Decoder
from retool.model.experts import products
from retool.model.experts.products import experts_mlp, grouped, grouped_by_loop
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.rl.objective.policy import policy_logprobs
from retool.sft.step import train_step
from tests.engine.models import prompts, run
from tests.model.tiny import make
from tests.ranks import need_gpus, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
DEVICE = "cuda"
BF16_ERROR = 1e-2  # of the norm of a tensor that went through a few bf16 products
VOCAB = 131
EXPERTS = 8
LAYERS = 3
PER_TOKEN = 3
LARGER = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_experts": 32,
    "moe_intermediate_size": 128,
    "initializer_range": 0.06,
}


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make(path, "qwen3_moe")
    return path


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.detach().double().cpu()
    return float((found.detach().double().cpu() - wanted).norm() / wanted.norm())


# Of 4 experts how many rows each has
SPREADS = {
    "uneven": [5, 130, 1, 64],
    "two have none": [0, 17, 0, 3],
    "one has all": [0, 0, 0, 200],
    "one row": [0, 0, 1, 0],
    "no rows": [0, 0, 0, 0],
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("width", [64, 72, 20], ids=["round", "aligned", "unaligned"])
def test_grouped_products_equal_float64(spread: str, width: int) -> None:
    """The kernel asks for rows that begin at multiples of 16 bytes; where they don't (20 channels
    of bf16), one expert is computed after the other.
    """
    sizes = SPREADS[spread]
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    rows = torch.randn(sum(sizes), width, generator=generator).bfloat16()
    weights = torch.randn(len(sizes), 48, width, generator=generator).bfloat16()
    direction = torch.randn(sum(sizes), 48, generator=generator).bfloat16()
    wide = (rows.double().requires_grad_(), weights.double().requires_grad_())
    exact = grouped_by_loop(wide[0], wide[1], ends)
    wanted = [exact, *torch.autograd.grad(exact, wide, direction.double())]

    here = (rows.to(DEVICE).requires_grad_(), weights.to(DEVICE).requires_grad_())
    assert products._has_kernel(here[0], here[1]) == (width != 20 and sum(sizes) > 0)
    ours = grouped(here[0], here[1], ends.to(DEVICE))
    found = [ours, *torch.autograd.grad(ours, here, direction.to(DEVICE))]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all()
        if other.norm() > 0:
            assert relative(one, other) < BF16_ERROR
        else:
            assert one.abs().sum() == 0
    unused = torch.tensor(sizes) == 0
    # Memory that no expert's rows were multiplied into must be zero, not what was there before
    assert found[2].cpu()[unused].abs().sum() == 0


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_layers_experts_equal_float64(tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16() / 4

    experts = torch.rand(tokens, 16, generator=generator).topk(4).indices
    inputs = [random(tokens, 64), random(tokens, 4), random(16, 96, 64), random(16, 64, 48)]
    direction = random(tokens, 64)
    results = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.bfloat16)):
        x, weights, gate_up, down = (t.to(device, dtype).requires_grad_() for t in inputs)
        out = experts_mlp(x, experts.to(device), weights, gate_up, down)
        leaves = (x, weights, gate_up, down)
        results.append([out, *torch.autograd.grad(out, leaves, direction.to(out))])
    for wanted, found in zip(*results, strict=True):
        assert relative(found, wanted) < BF16_ERROR


def samples(given: bool) -> list[Sample]:
    rng = np.random.default_rng(7)
    rows = []
    for n in (17, 5, 40, 9, 23, 12):
        order = rng.random((n, LAYERS, EXPERTS)).argsort(-1)
        experts = order[:, :, :PER_TOKEN].astype(np.int8) if given else None
        tokens = rng.integers(3, VOCAB, n).astype(np.int32)
        rows.append(Sample(tokens, rng.random(n) < 0.6, experts))
    return rows


def trained(
    folder: Path,
    device: str,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    steps: int = 1,
    given: bool = False,
    ep: int = 1,
) -> tuple[list[float], Sharded]:
    """Losses and norms of a few steps of two micro-batches, and the model after them."""
    mesh = make_mesh(device=device, ep=ep)
    wide = torch.promote_types(dtype, torch.float32)
    options = ModelOptions(dtype, wide, wide, recompute=recompute, use_compile=False)
    model = load_pretrained(folder, mesh, options)
    optimizer = AdamW(model, AdamWOptions())
    told: list[float] = []
    for _ in range(steps):
        rows = samples(given)
        packs = [pack(rows[mesh.dp_rank : 3 : mesh.dp]), pack(rows[3 + mesh.dp_rank :: mesh.dp])]
        trained_tokens = sum(row.trained for row in rows)
        measured = train_step(model, optimizer, packs, trained_tokens, 1e-3, StepTimer(mesh.device))
        loss, norm, skipped = measured.read()
        assert not skipped
        told += [loss, norm, *measured.read_balance().values()]
    return told, model


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_training_step_equals_the_cpus(folder: Path, recompute: Recompute) -> None:
    here, model = trained(folder, DEVICE, torch.float32, recompute)
    there, other = trained(folder, "cpu", torch.float32, recompute)
    assert here == pytest.approx(there, rel=1e-4)
    assert relative(model.grad, other.grad) < 1e-4


def trained_each(folder: str, device: str, ep: int) -> list[list[float]]:
    """What is told in one way of recomputation after the other."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return [
        trained(Path(folder), device, torch.float32, how, 2, ep=ep)[0]
        for how in ("none", "selective", "full")
    ]


@pytest.mark.first
def test_two_gpus_that_divide_experts_train_as_two_cpus_that_do_not(folder: Path) -> None:
    need_gpus(2)
    (here, _) = run_ranks(trained_each, 2, str(folder), DEVICE, 2)
    (there, _) = run_ranks(trained_each, 2, str(folder), "cpu", 1)
    for found, wanted in zip(here, there, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)


def test_gradients_in_bf16_are_near_float64s(folder: Path) -> None:
    """With the same experts on both sides: one that is chosen otherwise is no rounding error."""
    here, model = trained(folder, DEVICE, torch.bfloat16, given=True)
    there, other = trained(folder, "cpu", torch.float64, given=True)
    assert here[0] == pytest.approx(there[0], rel=1e-2)
    error = relative(model.grad, other.grad)
    print(f"\ngradients in bf16: off by {error:.2%}")
    assert error < 6e-2


def test_a_deterministic_run_repeats_its_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `trainer.deterministic` sets; the kernel's path, forward, backward and update."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (trained(folder, DEVICE, torch.bfloat16, "full", 3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == second[0]
    assert torch.equal(first[1].master, second[1].master)


def engine_on(model: Sharded, return_experts: bool = False) -> Engine:
    assert isinstance(model.module, Decoder)
    options = EngineOptions(
        max_num_seqs=8, page_size=16, kv_bytes=1 << 24, return_experts=return_experts
    )
    engine = Engine(model.module.config, model.mesh.device, options)
    engine.sync(model)
    return engine


def test_the_engine_samples_what_the_cpus_does(folder: Path) -> None:
    answers = []
    for device in ("cpu", DEVICE):
        options = ModelOptions(torch.float32, use_compile=False)
        engine = engine_on(load_pretrained(folder, make_mesh(device=device), options))
        for i, ids in enumerate(prompts(6, 40, VOCAB)):
            engine.start(i, ids, SamplingParams(max_tokens=24, temperature=0.0))
        answers.append(run(engine))
    there, here = answers
    for key, turn in there.items():
        assert here[key].tokens == turn.tokens
        np.testing.assert_allclose(here[key].logp, turn.logp, atol=1e-3)


def test_replay_narrows_the_gap_in_bf16(tmp_path: Path) -> None:
    """Sampled by the engine, scored by the trainer, with the engine's experts and with its own."""
    make(tmp_path, "qwen3_moe", **LARGER)
    assert read_model_config(tmp_path).hidden == LARGER["hidden_size"]
    options = ModelOptions(torch.bfloat16, use_compile=False)
    model = load_pretrained(tmp_path, make_mesh(device=DEVICE), options)
    engine = engine_on(model, return_experts=True)
    begun = prompts(16, 40, VOCAB)
    for i, ids in enumerate(begun):
        engine.start(i, ids, SamplingParams(max_tokens=64, seed=(i,)))
    done = run(engine)
    with_experts = []
    for i, prompt in enumerate(begun):
        experts = done[i].experts
        assert experts is not None
        ids = np.array(prompt + done[i].tokens, np.int32)
        padded = np.pad(experts, ((0, 1), (0, 0), (0, 0)), constant_values=-1)
        with_experts.append(Sample(ids, np.arange(len(ids)) >= len(prompt), padded))
    alone = [Sample(sample.tokens, sample.mask) for sample in with_experts]
    gaps = []
    for rows in (with_experts, alone):
        logps = policy_logprobs(model, rows, 1.0, Budget(micro_batch_size=4))[0]
        off = [
            np.abs(logp[len(prompt) :] - done[i].logp)
            for i, (logp, prompt) in enumerate(zip(logps, begun, strict=True))
        ]
        gaps.append(float(np.concatenate(off).mean()))
    print(f"\nmean gap in bf16: {gaps[0]:.4f} with replay, {gaps[1]:.4f} without")
    assert gaps[0] < 0.03
    assert gaps[0] <= 1.1 * gaps[1]
