"""Log-probabilities, entropies and their gradients against the dense computation in float64."""

from __future__ import annotations

import importlib.util
import os
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retool.model import logits as chunk
from retool.model.logprobs import chunk_shape, logprobs, weighted_logprob_sum

T = 37
D = 24
V = 331
BUDGETS = [8 * 500, 8 * 7 * 131, None]  # bytes: chunks that don't divide, and everything at once


def inputs(
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    tokens: int = T,
    dim: int = D,
    vocab: int = V,
    seed: int = 0,
):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64) * (3 / dim**0.5)
    labels = torch.randint(vocab, (tokens,), generator=g)
    weights = torch.rand(tokens, generator=g) * (torch.rand(tokens, generator=g) < 0.7)
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        labels.to(device),
        weights.to(device, chunk.accumulation_dtype(hidden.to(dtype))),
    )


def dense(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def rel(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(
    dtype: torch.dtype,
    device: str,
    temperature: float,
    budget: int | None,
    bounds: tuple[float, float],
    cap: float = 0.0,
    **sizes: int,
) -> None:
    """Values and gradients of a random mix of log-probability and entropy."""
    hidden, weight, labels, _ = inputs(dtype, device, **sizes)
    mix = torch.randn(
        2, len(hidden), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(device)
    logp, entropy = logprobs(
        hidden, weight, labels, temperature, entropy=True, logit_bytes=budget, cap=cap
    )
    assert entropy is not None and logp.dtype == entropy.dtype == chunk.accumulation_dtype(hidden)
    grads = torch.autograd.grad((mix[0] * logp + mix[1] * entropy).sum(), (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_logp, want_entropy = dense(*wide, labels, temperature, cap)
    want_grads = torch.autograd.grad((mix[0] * want_logp + mix[1] * want_entropy).sum(), wide)
    assert rel(logp, want_logp) < bounds[0] and rel(entropy, want_entropy) < bounds[0]
    for got, want, like in zip(grads, want_grads, (hidden, weight), strict=True):
        assert got.dtype == like.dtype and rel(got, want) < bounds[1]


def check_sum(
    dtype: torch.dtype,
    device: str,
    budget: int | None,
    bounds: tuple[float, float],
    cap: float = 0.0,
    **sizes: int,
) -> None:
    hidden, weight, labels, weights = inputs(dtype, device, **sizes)
    total = weighted_logprob_sum(hidden, weight, labels, weights, logit_bytes=budget, cap=cap)
    assert total.shape == () and total.dtype == chunk.accumulation_dtype(hidden)
    grads = torch.autograd.grad(total * -0.37, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = (dense(*wide, labels, 1.0, cap)[0] * weights).sum()
    assert rel(total, want) < bounds[0]
    for got, want_grad, like in zip(
        grads, torch.autograd.grad(want * -0.37, wide), (hidden, weight), strict=True
    ):
        assert got.dtype == like.dtype and rel(got, want_grad) < bounds[1]
    with torch.no_grad():
        again = weighted_logprob_sum(hidden, weight, labels, weights, logit_bytes=budget, cap=cap)
        assert rel(again, want) < bounds[0]


DTYPES = [
    (torch.float64, (1e-13, 1e-13)),
    (torch.float32, (1e-6, 2e-6)),
    (torch.bfloat16, (1e-6, 4e-3)),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(("dtype", "bounds"), DTYPES)
def test_values_and_gradients(
    dtype: torch.dtype, bounds: tuple[float, float], temperature: float, budget: int | None
) -> None:
    check(dtype, "cpu", temperature, budget, bounds)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("dtype", "bounds"), DTYPES)
def test_weighted_sum(dtype: torch.dtype, bounds: tuple[float, float], budget: int | None) -> None:
    check_sum(dtype, "cpu", budget, bounds)


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_capped_logits(cap: float) -> None:
    """Logits of up to 10: a cap that bends them all, and one that hardly does."""
    for dtype, bounds in DTYPES:
        check(dtype, "cpu", 0.6, BUDGETS[1], bounds, cap)
        check_sum(dtype, "cpu", BUDGETS[0], bounds, cap)


def test_one_logit_at_a_time() -> None:
    check(torch.float64, "cpu", 0.6, 1, (1e-13, 1e-13), tokens=5, vocab=7)
    check_sum(torch.float64, "cpu", 1, (1e-13, 1e-13), tokens=5, vocab=7)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(wanted: tuple[bool, bool]) -> None:
    hidden, weight, labels, weights = inputs()
    want = torch.autograd.grad(
        (dense(hidden, weight, labels, 1.0)[0] * weights).sum(), (hidden, weight)
    )
    for ask in (
        lambda h, w: (logprobs(h, w, labels)[0] * weights).sum(),
        lambda h, w: weighted_logprob_sum(h, w, labels, weights),
    ):
        leaves = [
            x.detach().requires_grad_(on) for x, on in zip((hidden, weight), wanted, strict=True)
        ]
        ask(*leaves).backward()
        for leaf, on, g in zip(leaves, wanted, want, strict=True):
            assert (
                (rel(leaf.grad, g) < 1e-13)
                if on and leaf.grad is not None
                else leaf.grad is None and not on
            )


def test_entropy_alone_is_differentiable() -> None:
    hidden, weight, labels, _ = inputs()
    _, entropy = logprobs(hidden, weight, labels, entropy=True, logit_bytes=8 * 500)
    assert entropy is not None
    got = torch.autograd.grad(entropy.sum(), (hidden, weight))
    for a, b in zip(
        got,
        torch.autograd.grad(dense(hidden, weight, labels, 1.0)[1].sum(), (hidden, weight)),
        strict=True,
    ):
        assert rel(a, b) < 1e-13


def test_no_entropy_unless_asked() -> None:
    hidden, weight, labels, _ = inputs()
    assert logprobs(hidden, weight, labels)[1] is None


def test_large_logits_stay_finite() -> None:
    """Logits of ±1e4 overflow an exponential that isn't taken from the largest."""
    hidden, weight, labels, weights = inputs(torch.float32)
    big = (hidden.detach() * 2000).requires_grad_()
    want, _ = dense(big.detach().double(), weight.detach().double(), labels, 1.0)
    logp, entropy = logprobs(big, weight, labels, entropy=True, logit_bytes=4 * 500)
    assert entropy is not None and rel(logp, want) < 1e-6 and torch.isfinite(entropy).all()
    for total in (logp.sum() + entropy.sum(), weighted_logprob_sum(big, weight, labels, weights)):
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, (big, weight)))


def test_weight_gradient_accumulates_in_float32() -> None:
    """4,096 equal contributions of 1/4096 make 1 in float32; added up in bfloat16 they stall at a
    small part of it.
    """
    tokens = 4096
    hidden = torch.full((tokens, 8), 2.0**-12, dtype=torch.bfloat16)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    budget = 4 * 2 * 16  # 16 tokens a chunk
    for total in (
        weighted_logprob_sum(hidden, weight, labels, torch.ones(tokens), logit_bytes=budget),
        logprobs(hidden, weight, labels, logit_bytes=budget)[0].sum(),
    ):
        (grad,) = torch.autograd.grad(total, weight)
        torch.testing.assert_close(
            grad, torch.tensor([[0.5], [-0.5]], dtype=torch.bfloat16).expand(2, 8), rtol=0, atol=0
        )


def test_untrained_tokens_have_no_influence() -> None:
    hidden, weight, labels, weights = inputs()
    hidden.retain_grad()
    weighted_logprob_sum(hidden, weight, labels, weights).backward()
    assert hidden.grad is not None and (weights == 0).any()
    assert (hidden.grad[weights == 0] == 0).all() and (hidden.grad[weights != 0] != 0).any(1).all()


def test_no_tokens() -> None:
    hidden, weight, labels, weights = (x[:0] if i != 1 else x for i, x in enumerate(inputs()))
    total = weighted_logprob_sum(hidden, weight, labels, weights)
    assert total.item() == 0 and (torch.autograd.grad(total, weight)[0] == 0).all()
    logp, _ = logprobs(hidden, weight, labels)
    assert logp.shape == (0,)


def test_bad_temperature() -> None:
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match="temperature=0 does not define a distribution"):
        logprobs(hidden, weight, labels, temperature=0)


@pytest.mark.parametrize(
    ("tokens", "vocab", "budget"),
    [(16384, 151936, 2**29), (3, 151936, 2**29), (100_000, 500, 2**24), (50, 1000, 7)],
)
def test_chunks_fit_the_budget(tokens: int, vocab: int, budget: int) -> None:
    rows, entries = chunk_shape(tokens, vocab, budget)
    assert 1 <= rows <= tokens and 1 <= entries <= vocab
    assert rows * entries <= budget
    assert rows == tokens or entries == vocab or rows * entries > budget // 4  # and use it


# ── memory
# ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_intermediate_exceeds_the_budget(dtype: torch.dtype) -> None:
    tokens = 700
    dim = 16
    vocab = 4000
    budget = 256 * 1024
    whole = tokens * vocab * dtype.itemsize
    results = vocab * dim * dtype.itemsize, tokens * dim * dtype.itemsize
    hidden, weight, labels, weights = inputs(dtype, tokens=tokens, dim=dim, vocab=vocab)
    for run in (
        lambda: sum(
            x.sum()
            for x in logprobs(hidden, weight, labels, 0.9, True, logit_bytes=budget)
            if x is not None
        ).backward(),
        lambda: weighted_logprob_sum(
            hidden, weight, labels, weights, logit_bytes=budget
        ).backward(),
        lambda: logprobs(
            hidden.detach(), weight.detach(), labels, entropy=True, logit_bytes=budget
        ),
    ):
        hidden.grad = weight.grad = None
        with LargestTensor() as seen:
            run()
        assert budget // 2 < seen.largest <= max(budget, *results) < whole / 40


def test_the_dense_computation_would_exceed_it() -> None:
    """The meter itself: it sees the [T, V] logits of the dense computation."""
    hidden, weight, labels, _ = inputs()
    with LargestTensor() as seen:
        dense(hidden, weight, labels, 1.0)
    assert seen.largest == T * V * 8


# ── Triton kernels: compiled on a GPU, interpreted (TRITON_INTERPRET=1) without
# ──────────────────────────────────

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_CASES = [
    (dtype, columns)
    for dtype in (torch.float32, torch.bfloat16)
    for columns in (1, 100, 128, 1000, 1024)
]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not INTERPRETED,
    reason="needs Triton and TRITON_INTERPRET=1 (Triton 3.6: with numpy < 2.3)",
)
@pytest.mark.parametrize(("dtype", "columns"), KERNEL_CASES)
def test_kernels_interpreted(
    dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_kernels("cpu", dtype, columns, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "columns"), KERNEL_CASES)
def test_kernels_on_the_gpu(
    gpu: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_kernels(gpu, dtype, columns, monkeypatch)


def check_kernels(
    device: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel against the plain operations in float64, over blocks that do and don't divide the
    row.
    """
    from retool.model import logits_triton as kernels

    # The interpreter rounds to bfloat16 by cutting off
    bound = 1e-6 if dtype == torch.float32 else 8e-3 if device == "cpu" else 4e-3
    monkeypatch.setattr(kernels, "BLOCK", 128)
    g = torch.Generator().manual_seed(columns)
    rows = 5
    stride = -(-columns // 64) * 64
    data = 5 * torch.randn(rows, columns, generator=g)
    # The last two lie in other chunks
    labels = torch.tensor([0, columns - 1, columns // 2, -3, columns + 2])
    stats = torch.stack(
        [
            torch.tensor([-1.7e38, 1, 2, 30, -1.7e38]),
            torch.tensor([0.0, 1.5, 1, 2, 0]),
            torch.tensor([0, -0.5, 0, -2, 0]),
            torch.randn(5),
        ]
    )
    lse, entropy, g_logp, g_entropy = torch.randn(4, rows, generator=g).add_(
        torch.tensor([9.0, 5, 0, 0])[:, None]
    )
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0])

    def buffer(kind: torch.dtype) -> Tensor:
        # What lies beyond the row must not be read
        out = torch.full((rows, stride), 1e30, dtype=kind, device=device)[:, :columns]
        return out.copy_(data)

    moved = [x.to(device) for x in (labels, lse, entropy, g_logp, g_entropy, weights)]
    for with_entropy, cap in product((False, True), (0.0, 6.0)):
        got = stats.clone().to(device)
        want = stats.double()
        kernels.update_rows(got, buffer(torch.float32), moved[0], 0.7, with_entropy, cap)
        chunk.update(want, data.double(), labels, 0.7, with_entropy, cap)
        torch.testing.assert_close(got.cpu(), want.float(), rtol=2e-6, atol=1e-6)
        e, g_e = (moved[2], moved[4]) if with_entropy else (None, None)
        out = kernels.gradient_rows(
            buffer(torch.float32), moved[0], 0.7, moved[1], e, moved[3], g_e, dtype, cap
        )
        wide = [entropy.double(), g_entropy.double()] if with_entropy else [None, None]
        want = chunk.gradient(
            data.double(), labels, 0.7, lse.double(), wide[0], g_logp.double(), wide[1], dtype, cap
        )
        assert out.dtype == dtype and rel(out.cpu(), want) < bound

    factor = torch.tensor(0.3)
    out = kernels.scaled_elements(data.to(device), factor.to(device), dtype)
    assert out.dtype == dtype and rel(out.cpu(), data.double() * factor.double()) < bound

    inside = labels.clamp(0, columns - 1)
    for cap in (0.0, 6.0):
        logp = torch.full((rows,), 7.0, device=device)
        want_logp = torch.zeros(rows, dtype=torch.float64)
        out = kernels.softmax_gradient_rows(
            buffer(torch.float32), inside.to(device), moved[5], logp, dtype, cap
        )
        want = chunk.softmax_gradient(
            data.double(), inside, weights.double(), want_logp, dtype, cap
        )
        assert rel(out.cpu(), want) < bound or columns == 1
        assert (out.cpu()[weights == 0] == 0).all()
        torch.testing.assert_close(
            logp.cpu(), torch.where(weights == 0, 7.0, want_logp.float()), rtol=1e-6, atol=2e-6
        )


# ── GPU
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


GPU_SIZES = {"tokens": 1000, "dim": 256, "vocab": 10_007}
GPU_DTYPES = [
    (torch.float64, (1e-12, 1e-12)),
    (torch.float32, (2e-6, 2e-6)),
    (torch.bfloat16, (2e-6, 4e-3)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [4 * 300 * 1000, 4 * 129 * 10_007, None])
@pytest.mark.parametrize(("dtype", "bounds"), GPU_DTYPES)
def test_values_and_gradients_on_the_gpu(
    gpu: str, dtype: torch.dtype, bounds: tuple[float, float], budget: int | None
) -> None:
    check(dtype, gpu, 0.8, budget, bounds, **GPU_SIZES)
    check_sum(dtype, gpu, budget, bounds, **GPU_SIZES)
    check(dtype, gpu, 0.8, budget, bounds, cap=5.0, **GPU_SIZES)
    check_sum(dtype, gpu, budget, bounds, cap=5.0, **GPU_SIZES)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(gpu: str) -> None:
    """A chunk of 2.4e9 logits: more than a 32-bit offset reaches."""
    tokens = 16_000
    dim = 64
    vocab = 150_000
    hidden, weight, labels, weights = inputs(torch.bfloat16, gpu, tokens, dim, vocab)
    large, small = (
        weighted_logprob_sum(hidden, weight, labels, weights, logit_bytes=n)
        for n in (12 << 30, 1 << 30)
    )
    for a, b in zip(
        torch.autograd.grad(large, (hidden, weight)),
        torch.autograd.grad(small, (hidden, weight)),
        strict=True,
    ):
        assert rel(a, b) < 4e-3
    assert rel(large, small) < 1e-5
    last = dense(hidden[-8:].detach().double(), weight.detach().double(), labels[-8:], 1.0)[0]
    assert rel(logprobs(hidden[-8:], weight, labels[-8:])[0], last) < 2e-6


@pytest.mark.gpu
def test_peak_memory_is_the_formula(gpu: str) -> None:
    tokens = 8192
    dim = 512
    vocab = 60_000
    budget = 256 << 20
    hidden, weight, labels, weights = inputs(torch.bfloat16, gpu, tokens, dim, vocab)
    slack = 24 << 20  # labels and statistics, allocator rounding

    def peak(run) -> tuple[int, object]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, out

    run = lambda: weighted_logprob_sum(hidden, weight, labels, weights, logit_bytes=budget)  # noqa: E731
    torch.autograd.grad(run(), (hidden, weight))  # cuBLAS takes its workspace once
    gradients = (vocab * dim + tokens * dim) * 2
    used, total = peak(run)
    assert used <= budget + vocab * dim * 4 + tokens * dim * 2 + slack
    used, _ = peak(lambda: torch.autograd.grad(total, (hidden, weight)))
    assert used <= gradients + slack
    rows, entries = chunk_shape(tokens, vocab, budget // 4)
    used, result = peak(lambda: logprobs(hidden, weight, labels, entropy=True, logit_bytes=budget))
    assert used <= budget + slack
    used, _ = peak(lambda: torch.autograd.grad(result[0].sum() + result[1].sum(), (hidden, weight)))
    assert rows * entries * 4 <= budget
    assert used <= budget + entries * dim * 4 + tokens * dim * 4 + gradients + slack


@pytest.mark.gpu
def test_it_does_not_wait_for_the_device(gpu: str) -> None:
    hidden, weight, labels, weights = inputs(torch.bfloat16, gpu, **GPU_SIZES)

    def step() -> None:
        weighted_logprob_sum(hidden, weight, labels, weights).backward()
        logp, entropy = logprobs(hidden, weight, labels, 0.9, entropy=True)
        assert entropy is not None
        (logp.sum() + entropy.sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
