"""Families on a GPU: windows in every attention kernel, logits and gradients against transformers on
the CPU, the engine against the CPU's, transformers' own modules. `-s` shows what was picked.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams
from retool.engine.kernels.attention import choose_paged
from retool.model.attention.dispatch import (
    FORWARD,
    TRUSTED,
    attention,
    choose_backend,
    kernel_error,
    why_not,
)
from retool.model.build import ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.sft.loss import loss_sum
from tests.engine.models import engine_of, forced, load, prompts, run
from tests.model.test_attention import BF16, GPU_SEQLENS, dense, inputs, rel
from tests.model.test_decoder import logits
from tests.model.tiny import SHAPE, make, stored_gradients
from tests.model.zoo import make_borrowed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
]
DEVICE = torch.device("cuda", 0)
HALF = torch.bfloat16
WINDOW = 40
LENGTHS = (17, 1, 40, 9)
# Heads of 256 as Gemma 3 has them, beside the tiny ones of 8 and 16
WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256}


# Tiny models, and what is other than in `tiny`
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "phi4-mini": ("phi4-mini", {}),
    "mistral": ("mistral-window", {}),
    "ministral": ("ministral", {}),
    "qwen2, a window": ("qwen2-window", {}),
    "olmo3": ("olmo3", {}),
    "gemma2": ("gemma2", {}),
    "gemma2, heads of 256": ("gemma2", WIDE),
    "gemma3": ("gemma3", {}),
    "gemma3, heads of 256": ("gemma3", WIDE),
    "granite4": ("granite4", {}),
    "smollm3": ("smollm3", {}),
}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 is fp32; and what a model held is given back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    gc.collect()


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(rng.integers(0, SHAPE["vocab_size"], n).astype(np.int32), np.ones(n, bool))
        for n in LENGTHS
    ]


def direction(rows: int, columns: int) -> torch.Tensor:
    """What the logits are weighed with: gradients are those of the sum."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


# ── attention with windows


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("backend", FORWARD)
def test_a_kernel_computes_windows_or_is_passed_over(backend: str, head_dim: int) -> None:
    inputs_of = DEVICE, HALF, head_dim
    if backend != "reference" and (reason := why_not(backend, *inputs_of)):
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = kernel_error(backend, *inputs_of, True)
        picked = choose_backend(*inputs_of, windowed=True)
        plain = choose_backend(*inputs_of)
    print(f"\n{backend}, heads of {head_dim}, a window: relative error {error:.2g}")
    print(f"auto picks {picked} with windows, {plain} without")
    assert picked != "reference", "windows by the plain formula are far too slow"
    if not error <= TRUSTED:
        assert picked != backend
        with warnings.catch_warnings(), pytest.raises(ValueError, match="computes wrongly"):
            warnings.simplefilter("ignore")
            choose_backend(*inputs_of, backend, windowed=True)
        return
    packs: list[tuple[int, ...]] = [GPU_SEQLENS, (1000,), (WINDOW, WINDOW + 1, 1)]
    for seqlens in packs:
        buffer, pack = inputs(6, 2, seqlens, head_dim, HALF, "cuda")
        q, k, v = buffer.split([6, 2, 2], 1)
        out = attention(q, k, v, pack._replace(window=WINDOW), backend)
        wide = buffer.detach().double().requires_grad_()
        wide_q, wide_k, wide_v = wide.split([6, 2, 2], 1)
        want = dense(wide_q, wide_k, wide_v, seqlens, WINDOW)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, HALF)
        (grad,) = torch.autograd.grad((out * weight).sum(), buffer)
        (want_grad,) = torch.autograd.grad((want * weight.double()).sum(), wide)
        assert rel(out, want) < BF16[0]
        parts = zip(grad.split([6, 2, 2], 1), want_grad.split([6, 2, 2], 1), strict=True)
        assert all(rel(part, wanted) < BF16[1] for part, wanted in parts)


def test_which_paged_kernels_sample_from_layers_with_windows() -> None:
    for head_dim in (64, 128, 256):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernels = [
                choose_paged(DEVICE, HALF, head_dim, 256, windowed=way) for way in (False, True)
            ]
        print(f"\nheads of {head_dim}: {kernels[0]} samples, {kernels[1]} where there are windows")
        assert kernels == ["triton", "triton"], "ours have windows"


# ── families


def theirs(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers on the CPU in fp32: logits [T, V], and the gradients by name."""
    rows = [model(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0] for s in samples()]
    found = torch.cat(rows)
    (found * direction(*found.shape)).sum().backward()
    return found.detach(), stored_gradients(model)


def ours(
    folder: Path, device: torch.device, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same of a pack, on a device."""
    model = load_pretrained(folder, make_mesh(device=device.type), ModelOptions(**options))
    found = model(pack(samples()).to(device), logits)
    (found * direction(*found.shape).to(found)).sum().backward()
    model.finish_gradients()
    return found.detach().float().cpu(), gradients(model)


def gradients(model: Sharded) -> dict[str, torch.Tensor]:
    """By name, on the CPU."""
    whole = model.grad.float().cpu()
    return {
        member.name: whole[unit.start + member.offset :][: member.numel].view(member.shape)
        for unit, member in model.layout.members
    }


def together(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The relative difference of all gradients as one vector."""
    each = [(found[name] - wanted[name]).double().square().sum() for name in wanted]
    norms = [gradient.double().square().sum() for gradient in wanted.values()]
    return float((sum(each) / sum(norms)) ** 0.5)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers_on_the_cpu(tmp_path: Path, case: str) -> None:
    """In bf16 they are off by at most twice what they are off by on the CPU, where nothing is fused."""
    family, more = CASES[case]
    want, want_gradients = theirs(make(tmp_path, family, **more))
    found, found_gradients = ours(tmp_path, DEVICE, param_dtype=torch.float32, use_compile=False)
    assert rel(found, want) < 1e-5
    for name, gradient in want_gradients.items():
        assert rel(found_gradients[name], gradient) < 2e-5, name
    off: dict[str, tuple[float, float]] = {}
    for device in ("cpu", DEVICE.type):
        found, found_gradients = ours(
            tmp_path, torch.device(device), param_dtype=HALF, use_compile=False
        )
        off[device] = rel(found, want), together(found_gradients, want_gradients)
        print(
            f"\n{case}, bf16, {device}: off by {off[device][0]:.2g}, gradients {off[device][1]:.2g}"
        )
    for here, cpu in zip(off[DEVICE.type], off["cpu"], strict=True):
        assert here < 2 * cpu


# Compiling takes seconds each: those two have most that Llama's layer hasn't
@pytest.mark.first
@pytest.mark.parametrize(
    "family",
    [
        "gemma3",
        "phi4-mini",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo3", "granite4", "smollm3")),
    ],
)
def test_compiled_blocks_compute_the_same(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    fp32 = {"param_dtype": torch.float32}
    want, want_gradients = ours(tmp_path, DEVICE, **fp32, use_compile=False)
    found, found_gradients = ours(tmp_path, DEVICE, **fp32, use_compile=True)
    assert rel(found, want) < 1e-5
    assert together(found_gradients, want_gradients) < 2e-5


# ── the engine


def gpu_engine(folder: Path, model: Sharded, **options: Any) -> Engine:
    config = read_model_config(folder)
    chosen = {"max_num_seqs": 8, "kv_bytes": 1 << 26, "use_compile": False, **options}
    engine = Engine(config, DEVICE, EngineOptions(**chosen))
    engine.sync(model)
    return engine


@pytest.mark.parametrize("case", CASES)
def test_greedy_samples_are_the_cpus(tmp_path: Path, case: str) -> None:
    """fp32; prompts of several pages, longer than the windows; some of their pages are computed in
    chunks.
    """
    family, more = CASES[case]
    make(tmp_path, family, **more)
    steady = read_model_config(tmp_path).steady_length
    params = SamplingParams(max_tokens=8 if steady else 24, temperature=0)
    ids = prompts(6, 20 if steady else 60, SHAPE["vocab_size"])
    way = {"page_size": 8, "max_batch_tokens": 16}
    found = []
    on_gpu = load_pretrained(
        tmp_path, make_mesh(device=DEVICE.type), ModelOptions(param_dtype=torch.float32)
    )
    for engine in (
        engine_of(tmp_path, load(tmp_path), **way),
        gpu_engine(tmp_path, on_gpu, **way),
    ):
        for i, prompt in enumerate(ids):
            engine.start(i, prompt, params)
        done = run(engine)
        found.append([done[i].tokens for i in range(len(ids))])
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral-window", "phi4-mini"])
def test_what_bf16_samples_is_what_the_training_forward_says(tmp_path: Path, family: str) -> None:
    """The kernels that are picked, pages of 256 tokens, sequences of up to three."""
    wide = WIDE if family.startswith("gemma") else {}
    windows = {} if family == "phi4-mini" else {"sliding_window": 70}
    longer = {} if family == "phi4-mini" else {"max_position_embeddings": 2048}
    make(tmp_path, family, **wide, **windows, **longer, initializer_range=0.08)
    model = load_pretrained(
        tmp_path,
        make_mesh(device=DEVICE.type),
        ModelOptions(param_dtype=HALF, use_compile=False),
    )
    steady = read_model_config(tmp_path).steady_length
    ids = prompts(12, 10 if steady else 600, SHAPE["vocab_size"])
    engine = gpu_engine(tmp_path, model)
    for i, prompt in enumerate(ids):
        engine.start(i, prompt, SamplingParams(max_tokens=20, seed=(i,)))
    differences = []
    for i, turn in run(engine).items():
        assert isinstance(i, int)
        want = forced(model, ids[i] + turn.tokens)[-len(turn.tokens) :].cpu()
        differences.append((torch.tensor(turn.logp) - want).abs())
    gap = float(torch.cat(differences).mean())
    print(f"\n{family}: sampled log-probabilities differ from the trainer's by {gap:.2g}")
    assert gap < 2e-2


# ── transformers' own modules


@pytest.mark.parametrize("architecture", ["cohere2", "exaone4", "glm", "phi"])
def test_a_borrowed_model_packed_is_padded_and_is_transformers(
    tmp_path: Path, architecture: str
) -> None:
    """cohere2 and exaone4 have windows, glm turns half of each head, phi's head has a bias."""
    model = make_borrowed(tmp_path, architecture)
    rng = np.random.default_rng(0)
    documents = [
        Sample(rng.integers(3, 61, n).astype(np.int32), rng.random(n) < 0.7) for n in (20, 7, 2, 13)
    ]
    wanted = torch.zeros(())
    for sample in documents:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        wanted = wanted - logp[torch.from_numpy(sample.mask[1:])].sum()
    for dtype, bound in ((torch.float32, 2e-5), (HALF, 3e-2)):
        found = []
        for pad_to in (None, 24):
            sharded = load_pretrained(
                tmp_path, make_mesh(device=DEVICE.type), ModelOptions(param_dtype=dtype)
            )
            loss = loss_sum(sharded, pack(documents, pad_to=pad_to))
            loss.backward()
            sharded.finish_gradients()
            assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=bound)
            found.append(gradients(sharded))
        assert together(*found) < bound
