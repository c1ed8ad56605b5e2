"""Every attention kernel against the dense formula in float64, written down once more here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from retool.batch import Sample, pack
from retool.model.attention import (
    cudnn as attention_cudnn,
)
from retool.model.attention import dispatch as kernels
from retool.model.attention import (
    flash as attention_flash,
)
from retool.model.attention import parts
from retool.model.attention import (
    reference as attention_reference,
)
from retool.model.attention.dispatch import (
    attention,
    attention_backward,
    attention_forward_lse,
    choose_backend,
)
from retool.model.attention.joined import joined_attention
from retool.model.attention.pack import Pack, new_pack, pack_of

HEADS = [(14, 2), (9, 3), (8, 4), (6, 6)]
SEQLENS = (1, 37, 5, 1, 64, 20)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: tuple[int, ...],
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """One [T, T] score matrix per head with a block-diagonal causal mask, in the dtype given."""
    document = torch.repeat_interleave(torch.arange(len(seqlens)), torch.tensor(seqlens)).to(
        q.device
    )
    position = torch.arange(len(document), device=q.device)
    allowed = (document[:, None] == document[None]) & (position[:, None] >= position[None])
    if window:
        allowed &= position[:, None] - position[None] < window
    groups = q.shape[1] // k.shape[1]
    outs = []
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // groups].T / q.shape[2] ** 0.5
        if cap:
            scores = cap * torch.tanh(scores / cap)
        outs.append(
            torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1) @ v[:, n // groups]
        )
    return torch.stack(outs, 1)


def rel(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def inputs(
    heads: int,
    kv_heads: int,
    seqlens: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
):
    """One [T, N + 2K, H] buffer, whose strided views are q, k and v; and its documents."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(
        sum(seqlens), heads + 2 * kv_heads, head_dim, dtype=torch.float64, generator=generator
    ).to(device, dtype)
    return buffer.requires_grad_(), new_pack(seqlens, torch.device(device))


def run(
    buffer: Tensor,
    heads: int,
    kv_heads: int,
    pack: Pack,
    backend: str,
    weight: Tensor,
):
    """(out, gradient of the buffer) for the objective (out · weight).sum()."""
    q, k, v = buffer.split([heads, kv_heads, kv_heads], 1)
    out = dense(q, k, v, pack.seqlens) if backend == "dense" else attention(q, k, v, pack, backend)
    (grad,) = torch.autograd.grad((out * weight.to(out)).sum(), buffer)
    return out.detach(), grad


def check(
    heads: int,
    kv_heads: int,
    seqlens: tuple[int, ...],
    head_dim: int,
    backend: str,
    dtype: torch.dtype,
    device: str,
    bounds,
) -> None:
    buffer, pack = inputs(heads, kv_heads, seqlens, head_dim, dtype, device)
    weight = torch.randn(
        sum(seqlens), heads, head_dim, generator=torch.Generator().manual_seed(1)
    ).to(device, dtype)
    out, grad = run(buffer, heads, kv_heads, pack, backend, weight)
    wide = buffer.detach().double().requires_grad_()
    want_out, want_grad = run(wide, heads, kv_heads, pack, "dense", weight)
    assert out.dtype == dtype and grad.dtype == dtype
    assert rel(out, want_out) < bounds[0]
    for part, want in zip(
        grad.split([heads, kv_heads, kv_heads], 1),
        want_grad.split([heads, kv_heads, kv_heads], 1),
        strict=True,
    ):
        # Documents of one token: no gradient of q and k
        scale = want.norm() if want.norm() > 0 else want_grad.norm()
        assert (part.double() - want).norm() < bounds[1] * scale


def check_no_leak(
    heads: int,
    kv_heads: int,
    seqlens: tuple[int, ...],
    changed: int,
    backend: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Another content of document `changed` leaves every other document's output and gradients the
    same, bit for bit.

    cuDNN adds up dq in no fixed order, so its gradients are held to bfloat16's rounding instead.
    """
    buffer, pack = inputs(heads, kv_heads, seqlens, 32, dtype, device)
    weight = torch.randn(sum(seqlens), heads, 32, generator=torch.Generator().manual_seed(1)).to(
        device, dtype
    )
    begin = sum(seqlens[:changed])
    inside = slice(begin, begin + seqlens[changed])
    other = buffer.detach().clone()
    other[inside] = 3 * torch.randn_like(other[inside])
    results = [
        run(x, heads, kv_heads, pack, backend, weight) for x in (buffer, other.requires_grad_())
    ]
    outside = torch.ones(sum(seqlens), dtype=torch.bool, device=device)
    outside[inside] = False
    for name, a, b in zip(("out", "grad"), *results, strict=True):
        assert not torch.equal(a[inside], b[inside])
        assert torch.equal(a[outside], b[outside]) or (
            backend == "cudnn" and name == "grad" and rel(a[outside], b[outside]) < 4e-3
        )


# ── CPU
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        (torch.float64, (1e-14, 1e-14)),
        (torch.float32, (1e-6, 1e-6)),
        (torch.bfloat16, (4e-3, 1.6e-2)),
    ],
)
def test_reference_equals_dense(
    heads: int, kv_heads: int, dtype: torch.dtype, bounds: tuple[float, float]
) -> None:
    check(heads, kv_heads, SEQLENS, 32, "reference", dtype, "cpu", bounds)


def test_documents_of_one_token() -> None:
    check(6, 3, (1, 1), 16, "reference", torch.float64, "cpu", (1e-14, 1e-14))


@pytest.mark.parametrize("head_dim", [1, 7, 16, 80])
def test_reference_takes_any_head_dim(head_dim: int) -> None:
    check(4, 2, (3, 300), head_dim, "reference", torch.float64, "cpu", (1e-14, 1e-14))


@pytest.mark.parametrize("changed", [0, 1, 3, 5])
def test_reference_does_not_leak(changed: int) -> None:
    check_no_leak(9, 3, SEQLENS, changed, "reference", torch.float32, "cpu")


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_formula_equals_dense_in_blocks(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs off the CPU, here with query blocks that don't divide the document."""
    monkeypatch.setattr(attention_reference, "SCORE_BUDGET", heads * 50 * 7)
    monkeypatch.setattr(attention_reference, "_cpu_forward", attention_reference.plain_forward)
    monkeypatch.setattr(attention_reference, "_cpu_backward", attention_reference.plain_backward)
    assert [s.stop for s in attention_reference._blocks(50, heads)][-2:] == [49, 50]
    check(heads, kv_heads, (50, 1, 13), 8, "reference", torch.float64, "cpu", (1e-14, 1e-14))


def test_lse_is_the_log_sum_exp_of_the_scores() -> None:
    buffer, pack = inputs(6, 3, (4, 9), 16, torch.float64)
    q, k, v = buffer.detach().split([6, 3, 3], 1)
    _, lse = attention_forward_lse(q, k, v, pack, "reference")
    want = [(q[8, n] @ k[4:9, n // 2].T / 4).logsumexp(-1) for n in range(6)]
    torch.testing.assert_close(lse[:, 8], torch.stack(want), rtol=1e-14, atol=1e-14)


def check_saved(
    backend: str,
    dtype: torch.dtype,
    device: str,
    seqlens: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block recomputed from the kept (out, lse): the same result and gradients, and no second run
    of the kernel.
    """
    buffer, pack = inputs(8, 4, seqlens, 32, dtype, device)
    weight = torch.randn(sum(seqlens), 8, 32, generator=torch.Generator().manual_seed(1)).to(
        device, dtype
    )
    out, grad = run(buffer, 8, 4, pack, backend, weight)
    q, k, v = buffer.split([8, 4, 4], 1)
    kept, lse = attention_forward_lse(q, k, v, pack, backend)
    assert not kept.requires_grad and torch.equal(kept, out)
    explicit = attention_backward(weight.to(dtype), q, k, v, (kept, lse), pack, backend)
    same = torch.equal if backend != "cudnn" else lambda a, b: rel(a, b) < 4e-3
    assert same(torch.cat(explicit, 1), grad)
    with monkeypatch.context() as patch:
        patch.delitem(attention_backward.__globals__["FORWARD"], backend)
        again = attention(q, k, v, pack, backend, (kept, lse))
        assert again.data_ptr() == kept.data_ptr()
        (grad_again,) = torch.autograd.grad((again * weight).sum(), buffer)
    assert same(grad_again, grad)


def test_recomputation_does_not_run_the_kernel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check_saved("reference", torch.float32, "cpu", SEQLENS, monkeypatch)


@pytest.mark.parametrize(
    ("window", "cap"), [(1, 0.0), (2, 0.0), (7, 0.0), (20, 0.0), (63, 0.0), (0, 1.5), (7, 1.5)]
)
@pytest.mark.parametrize("budget", [attention_reference.SCORE_BUDGET, 14 * 64 * 5])
def test_windows_and_caps_equal_dense(
    window: int, cap: float, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents shorter and longer than the window, in one block of queries and in many."""
    monkeypatch.setattr(attention_reference, "SCORE_BUDGET", budget)
    monkeypatch.setattr(attention_reference, "MIN_WINDOW_ROWS", 5)
    heads, kv_heads = 14, 2
    buffer, pack = inputs(heads, kv_heads, SEQLENS, 8, torch.float64)
    q, k, v = buffer.split([heads, kv_heads, kv_heads], 1)
    pack = pack._replace(window=window, cap=cap)
    found = attention(q, k, v, pack, "reference")
    want = dense(q, k, v, SEQLENS, window, cap)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    (grad,) = torch.autograd.grad((found * weight).sum(), buffer)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), buffer)
    assert rel(found, want) < 1e-14 and rel(grad, want_grad) < 1e-13
    kept = attention_forward_lse(q, k, v, pack, "reference")
    again = attention(q, k, v, pack, "reference", kept)
    (from_saved,) = torch.autograd.grad((again * weight).sum(), buffer)
    assert torch.equal(from_saved, grad)


def test_a_window_across_the_longest_document_is_none() -> None:
    batch = pack([Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in (5, 9)])
    assert [pack_of(batch, window).window for window in (0, 8, 9, 10)] == [0, 8, 0, 0]
    assert pack_of(batch, 8, 1.5)[1:] == (9, (5, 9), 8, 1.5)


def test_a_kernel_without_windows_is_not_chosen_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0), torch.bfloat16, 64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(attention_flash, "find_spec", lambda _: True)

    def error(backend: str, *inputs: object) -> float:
        return 0.9 if backend == "flash" and any(inputs[3:]) else 0.005

    monkeypatch.setattr(kernels, "kernel_error", error)
    assert choose_backend(*gpu) == "flash"
    with pytest.warns(UserWarning, match="'flash' computes wrongly"):
        assert choose_backend(*gpu, windowed=True) == "varlen"
    assert kernels._for_short.__wrapped__(*gpu, True) == "varlen"


def test_a_kernel_is_tried_with_a_window_where_layers_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = kernels.FORWARD["reference"]
    deaf = lambda q, k, v, pack: right(q, k, v, pack._replace(window=0))  # noqa: E731
    monkeypatch.setitem(kernels.FORWARD, "flash", deaf)
    monkeypatch.setitem(kernels.BACKWARD, "flash", kernels.BACKWARD["reference"])
    inputs = "flash", torch.device("cpu"), torch.float32, 16
    monkeypatch.setattr(attention_flash, "missing", lambda _: "")
    assert kernels.kernel_error.__wrapped__(*inputs) < 1e-6
    assert kernels.kernel_error.__wrapped__(*inputs, True) > 0.1


def test_a_kernel_is_tried_with_a_cap_where_scores_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = kernels.FORWARD["reference"]
    deaf = lambda q, k, v, pack: right(q, k, v, pack._replace(cap=0.0))  # noqa: E731
    monkeypatch.setitem(kernels.FORWARD, "flash", deaf)
    monkeypatch.setitem(kernels.BACKWARD, "flash", kernels.BACKWARD["reference"])
    inputs = "flash", torch.device("cpu"), torch.float32, 16
    monkeypatch.setattr(attention_flash, "missing", lambda _: "")
    assert kernels.kernel_error.__wrapped__(*inputs) < 1e-6
    assert kernels.kernel_error.__wrapped__(*inputs, False, True) > 0.03


def test_only_what_has_caps_is_chosen_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0), torch.bfloat16, 64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_flash, "find_spec", lambda _: True)
    monkeypatch.setattr(kernels, "kernel_error", lambda *_: 0.005)
    assert choose_backend(*gpu, capped=True) == "flash"
    assert choose_backend(*gpu) == "cudnn"
    for name in ("cudnn", "varlen", "flash3"):
        with pytest.raises(ValueError, match="has no caps of scores"):
            choose_backend(*gpu, name, capped=True)
    # A build without them
    monkeypatch.setattr(kernels, "kernel_error", lambda *inputs: 0.9 if inputs[4:] else 0.005)
    with (
        pytest.warns(UserWarning, match="'flash' computes wrongly"),
        pytest.warns(UserWarning, match="the plain formula does, slower"),
    ):
        assert choose_backend(*gpu, capped=True) == "reference"


def test_choose_backend_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(cpu, torch.float64, 64) == "reference"
    assert choose_backend(cpu, torch.bfloat16, 64, "reference") == "reference"
    with pytest.raises(ValueError, match=r"'flash' needs a GPU, and this is cpu\. Use reference"):
        choose_backend(cpu, torch.bfloat16, 64, "flash")
    with pytest.raises(
        ValueError,
        match=r"'flsh' is not known\. Use auto, flash, varlen, flash3, flash4, cudnn, reference",
    ):
        choose_backend(cpu, torch.bfloat16, 64, "flsh")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float32, 64, "bfloat16 or float16, not float32"),
        (torch.bfloat16, 20, "multiples of 8"),
    ],
)
def test_choose_backend_names_what_a_kernel_cannot_take(
    dtype: torch.dtype, head_dim: int, message: str
) -> None:
    gpu = torch.device("cuda", 0)
    assert choose_backend(gpu, dtype, head_dim) == "reference"
    with pytest.raises(ValueError, match=message):
        choose_backend(gpu, dtype, head_dim, "varlen")


def test_a_deterministic_backend_is_chosen_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(kernels, "kernel_error", lambda *_: 0.005)
    gpu = torch.device("cuda", 0)
    assert choose_backend(gpu, torch.bfloat16, 64) == "varlen"
    assert (
        choose_backend(gpu, torch.float32, 64)
        == choose_backend(torch.device("cpu"), torch.float32, 64)
        == "reference"
    )
    with pytest.raises(ValueError, match="no fixed order"):
        choose_backend(gpu, torch.bfloat16, 64, "cudnn")


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize(
    ("spoilt", "least", "most"),
    [(None, 0, 1e-6), ("out", 0.2, 0.3), ("dq", 0.2, 0.3), ("nan", math.nan, math.nan)],
)
def test_a_kernel_that_computes_wrongly_is_found_out(
    backend: str, spoilt: str | None, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Pack] = []

    def forward(q, k, v, pack):
        tried.append(pack)
        out, lse = attention_reference.reference_forward(q, k, v, pack)
        return out * {"out": 0.75, "nan": math.nan}.get(spoilt, 1), lse

    def backward(*args):
        dq, dk, dv = attention_reference.reference_backward(*args)
        return dq * (0.75 if spoilt == "dq" else 1), dk, dv

    monkeypatch.setitem(kernels.FORWARD, backend, forward)
    monkeypatch.setitem(kernels.BACKWARD, backend, backward)
    error = kernels.kernel_error.__wrapped__(backend, torch.device("cpu"), torch.float32, 16)
    assert least <= error <= most if spoilt != "nan" else not error <= kernels.TRUSTED
    long = [run for run in attention_cudnn._runs(tried[0].seqlens) if run.length]
    for run in long:
        rounded = attention_cudnn._rounded(run.length)
        assert run.length < rounded <= sum(tried[0].seqlens) - run.begin, (
            "the next one is read along"
        )
    assert bool(long) == (backend == "cudnn")


def test_only_kernels_that_compute_rightly_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"cudnn": math.nan, "flash": 1.2, "varlen": 0.005}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_flash, "available", lambda _: ["flash", "varlen"])
    monkeypatch.setattr(attention_flash, "missing", lambda _: "")
    monkeypatch.setattr(kernels, "kernel_error", lambda backend, *_: errors[backend])
    inputs = torch.device("cuda", 0), torch.bfloat16, 16
    with pytest.warns(
        UserWarning, match=r"'(cudnn|flash)' computes wrongly on this device with heads of 16"
    ) as said:
        assert choose_backend(*inputs) == "varlen"
    assert len(said) == 2
    with pytest.raises(
        ValueError, match=r"'flash' computes wrongly .* \(relative error 1\.2\): .* or use auto"
    ):
        choose_backend(*inputs, "flash")
    assert kernels._for_short.__wrapped__(*inputs) == "varlen"
    errors["varlen"] = 0.04
    with pytest.warns(UserWarning):
        assert choose_backend(*inputs) == "reference"
    errors["flash"] = 0.02
    assert kernels._for_short.__wrapped__(*inputs) == choose_backend(*inputs, "flash") == "flash"


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)])
def test_joined_heads_have_the_same_bits(heads: tuple[int, int]) -> None:
    """One buffer in, one gradient out: known or not, as three tensors."""
    n, k = heads
    lengths = (5, 1, 9)
    pack = new_pack(lengths, torch.device("cpu"), window=4)
    buffer = torch.randn(15, n + 2 * k, 8, generator=torch.Generator().manual_seed(0))
    buffer.requires_grad_()
    weight = torch.randn(15, n, 8, generator=torch.Generator().manual_seed(1))
    want = attention(*parts.apart(buffer, k), pack, "reference")
    (d_want,) = torch.autograd.grad(want, buffer, weight)
    kept = attention_forward_lse(*parts.apart(buffer, k), pack, "reference")
    for saved in (None, kept):
        out = joined_attention(buffer, k, pack, "reference", saved)
        (d_out,) = torch.autograd.grad(out, buffer, weight)
        assert torch.equal(out, want)
        assert torch.equal(d_out, d_want)


def test_gradients_in_one_buffer_are_not_copied_together() -> None:
    q, k, v = parts.new_parts(torch.empty(7, 4, 8), torch.empty(7, 2, 8))
    for number, part in enumerate((q, k, v)):
        part.fill_(number)
    joined = parts.together((q, k, v))
    assert joined.data_ptr() == q.data_ptr()
    assert torch.equal(joined, torch.cat([q, k, v], 1))
    for others in ((q, v, k), (q, k, v.clone()), (q[1:], k[1:], v[:-1])):
        copied = parts.together(others)
        assert copied.data_ptr() != q.data_ptr()
        assert torch.equal(copied, torch.cat(others, 1))


def test_a_packages_function_is_called_past_torchs_dispatcher() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    registered = torch.library.custom_op("retool_tests::doubled", doubled, mutates_args=())
    assert attention_flash.unregistered(registered) is doubled
    assert attention_flash.unregistered(doubled) is doubled


@pytest.mark.parametrize(
    ("generation", "installed", "found"),
    [
        (8, ["flash_attn_interface", "flash_attn", "flash_attn.cute"], ["flash", "varlen"]),
        (
            9,
            ["flash_attn_interface", "flash_attn", "flash_attn.cute"],
            ["flash3", "flash", "varlen"],
        ),
        (
            10,
            ["flash_attn_interface", "flash_attn", "flash_attn.cute"],
            ["flash4", "flash", "varlen"],
        ),
        (10, ["flash_attn"], ["flash", "varlen"]),
        (9, [], ["varlen"]),
    ],
)
def test_flash_attention_is_the_newest_that_is_there(
    generation: int, installed: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (generation, 0))
    monkeypatch.setattr(
        attention_flash, "find_spec", lambda name: True if name in installed else None
    )
    assert attention_flash.available(torch.device("cuda", 0)) == found
    if "flash4" not in found and len(installed) < 3:
        with pytest.raises(
            ValueError, match=r"'flash4' needs the package flash_attn.cute\. Install it"
        ):
            choose_backend(torch.device("cuda", 0), torch.bfloat16, 64, "flash4")


def test_torch_runs_the_version_that_each_call_names() -> None:
    """With a stand-in for the package: which kernels torch then calls is its own affair."""
    registry = torch.nn.attention
    used = []

    class Handle:
        def remove(self) -> None:
            used.append("own")

    def register() -> Handle:
        used.append("FA3")
        return Handle()

    before = dict(registry._registry._FLASH_ATTENTION_IMPLS)
    registry.register_flash_attention_impl("FA3", register_fn=register)
    try:
        for version in (None, "FA3", "FA3", None, None):
            attention_flash._use(version)
    finally:
        registry._registry._FLASH_ATTENTION_IMPLS.update(before)
    assert used == ["FA3", "own"]


@pytest.mark.parametrize("backend", ["flash3", "cudnn"])
def test_a_kernel_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    failures: list[Exception] = [
        RuntimeError("built for another GPU"),
        torch.OutOfMemoryError("no room"),
    ]

    def fails(*_: Tensor) -> None:
        raise failures.pop(0)

    monkeypatch.setitem(kernels.FORWARD, backend, fails)
    monkeypatch.setattr(attention_flash, "missing", lambda _: "")
    inputs = backend, torch.device("cpu"), torch.float32, 16
    with pytest.warns(UserWarning, match=f"'{backend}' fails here: built for another GPU"):
        assert kernels.kernel_error.__wrapped__(*inputs) == math.inf
    with pytest.raises(torch.OutOfMemoryError):
        kernels.kernel_error.__wrapped__(*inputs)


def test_cudnn_runs_cover_the_pack() -> None:
    n = attention_cudnn.CUDNN_SHORTEST
    runs = attention_cudnn._runs((5, 7, n, n, n + 1, 3))
    assert [(r.first, r.stop, r.begin, r.end, r.length) for r in runs] == [
        (0, 2, 0, 12, 0),
        (2, 4, 12, 12 + 2 * n, n),
        (4, 5, 12 + 2 * n, 13 + 3 * n, n + 1),
        (5, 6, 13 + 3 * n, 16 + 3 * n, 0),
    ]


def test_cudnn_lengths_round_to_16_per_octave() -> None:
    lengths = range(4096, 16385)
    rounded = {attention_cudnn._rounded(n) for n in lengths}
    assert len(rounded) == 33 and {4096, 8192, 16384} <= rounded
    assert all(n <= attention_cudnn._rounded(n) <= n * 17 / 16 for n in lengths)


@pytest.mark.parametrize("huge", [1 << 31, 100 * 64, 68 * 64])
@pytest.mark.parametrize(
    "seqlens", [(70, 70, 9, 1, 67, 3), (70, 70), (67,), (67, 3, 67), (3, 2), (64,)]
)
def test_cudnn_splitting_and_padding(
    seqlens: tuple[int, ...], huge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack is cut into long and short runs, long ones padded, and everything put back in place;
    a stand-in computes the batches.

    Of runs of 100 (or 68, which 67 is rounded to) tokens and more, rows of 64 elements, it isn't
    asked to where they are `huge`. A
    shape has one set of strides, whatever stands behind a document: plans are made for strides.
    """
    strides = defaultdict[torch.Size, set[tuple[int, ...]]](set)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: None, want_lse: bool, dropout: float, causal: bool
    ):
        strides[q.shape].add((*q.stride(), *k.stride()))
        assert (
            q.shape[0] * q.shape[2] * 64 < huge
            and (bias, want_lse, dropout, causal) == (None, True, 0.0, True)
            and q.shape[2] == attention_cudnn._rounded(q.shape[2])
        )
        parts = [
            attention_reference.plain_forward(*(x[b].transpose(0, 1) for x in (q, k, v)))
            for b in range(q.shape[0])
        ]
        return torch.stack([o for o, _ in parts]).transpose(1, 2), torch.stack(
            [s for _, s in parts]
        )

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
    ):
        assert (
            rest[2:] == (None, None, None, q.shape[2], q.shape[2], 0.0, True)
            and lse.is_contiguous()
        )
        parts = [
            attention_reference.plain_backward(
                *(x[b].transpose(0, 1) for x in (dout, q, k, v, out)), lse[b, :, :, 0]
            )
            for b in range(q.shape[0])
        ]
        return tuple(torch.stack(grads).transpose(1, 2) for grads in zip(*parts, strict=True))

    class Ops:
        _scaled_dot_product_cudnn_attention = staticmethod(forward)
        _scaled_dot_product_cudnn_attention_backward = staticmethod(backward)

    buffer, pack = inputs(4, 2, seqlens, 8, torch.float64)
    weight = torch.randn(sum(seqlens), 4, 8, dtype=torch.float64)
    want = run(buffer, 4, 2, pack, "dense", weight)
    monkeypatch.setattr(attention_cudnn, "CUDNN_SHORTEST", 10)
    monkeypatch.setattr(attention_cudnn, "INDEXABLE", huge)
    attention_cudnn._runs.cache_clear()
    q, k, v = buffer.detach().split([4, 2, 2], 1)
    with monkeypatch.context() as patch:
        patch.setattr(attention_cudnn.torch.ops, "aten", Ops)
        out, lse = attention_cudnn.cudnn_forward(q, k, v, pack, short_forward)
        grads = attention_cudnn.cudnn_backward(weight, q, k, v, out, lse, pack, short_backward)
    attention_cudnn._runs.cache_clear()
    assert rel(out, want[0]) < 1e-6  # lse is float32 here, as cuDNN's is
    assert rel(torch.cat(grads, 1), want[1]) < 1e-6
    assert all(len(found) == 1 for found in strides.values()), strides


def documents(pack: Pack) -> Iterator[slice]:
    edges = pack.cu_seqlens.tolist()
    assert (
        edges[0] == 0
        and tuple(b - a for a, b in pairwise(edges)) == pack.seqlens
        and pack.max_seqlen == max(pack.seqlens)
    )
    return (slice(a, b) for a, b in pairwise(edges))


def short_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    parts = [attention_reference.plain_forward(q[s], k[s], v[s]) for s in documents(pack)]
    return torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts], 1)


def short_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pack: Pack,
):
    parts = [
        attention_reference.plain_backward(dout[s], q[s], k[s], v[s], out[s], lse[:, s])
        for s in documents(pack)
    ]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


# ── GPU
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# What bfloat16 kernels are within of each other; both sides here start from the same bfloat16
# inputs
BF16 = (
    4e-3,
    1.6e-2,
)
GPU_SEQLENS = (1, 300, 17, 1, 700, 128, 64)


@pytest.fixture(params=["flash", "flash3", "flash4", "varlen", "cudnn", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fused kernel; cudnn takes the documents of 100 tokens or more."""
    if request.param in attention_flash.PACKAGE and request.param not in attention_flash.available(
        torch.device("cuda", 0)
    ):
        pytest.skip("not installed, or for other GPUs")
    monkeypatch.setattr(attention_cudnn, "CUDNN_SHORTEST", 100)
    attention_cudnn._runs.cache_clear()
    yield choose_backend(torch.device("cuda", 0), torch.bfloat16, 64, request.param)
    attention_cudnn._runs.cache_clear()


@pytest.fixture
def deterministic(backend: str) -> Iterator[None]:
    """FlashAttention's backward adds up dq in no fixed order unless asked; the others have no such
    switch or need none.
    """
    torch.use_deterministic_algorithms(backend in ("flash", "varlen"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS, (7, 1)])
def test_kernels_equal_dense(backend: str, heads: int, kv_heads: int, head_dim: int) -> None:
    check(heads, kv_heads, GPU_SEQLENS, head_dim, backend, torch.bfloat16, "cuda", BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("seqlens", [(512, 512, 512), (1000,), (1000, 1000), (2048, 3), (1,)])
def test_kernels_equal_dense_on_other_packs(backend: str, seqlens: tuple[int, ...]) -> None:
    check(14, 2, seqlens, 64, backend, torch.bfloat16, "cuda", BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("changed", [0, 1, 4, 6])
def test_kernels_do_not_leak(backend: str, changed: int, deterministic: None) -> None:
    check_no_leak(9, 3, GPU_SEQLENS, changed, backend, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_kernels_recompute_without_running_again(
    backend: str, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_saved(backend, torch.bfloat16, "cuda", GPU_SEQLENS, monkeypatch)


@pytest.mark.gpu
def test_kernels_agree_on_lse(backend: str) -> None:
    buffer, pack = inputs(14, 2, GPU_SEQLENS, 64, torch.bfloat16, "cuda")
    q, k, v = buffer.detach().split([14, 2, 2], 1)
    _, lse = attention_forward_lse(q, k, v, pack, backend)
    _, want = attention_forward_lse(q.double(), k.double(), v.double(), pack, "reference")
    torch.testing.assert_close(lse.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_attention_does_not_wait_for_the_device(backend: str) -> None:
    buffer, pack = inputs(14, 2, GPU_SEQLENS, 64, torch.bfloat16, "cuda")
    weight = torch.randn(sum(GPU_SEQLENS), 14, 64, device="cuda", dtype=torch.bfloat16)
    run(buffer, 14, 2, pack, backend, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(buffer, 14, 2, pack, backend, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_float64_reference_on_the_gpu() -> None:
    check(14, 2, SEQLENS, 64, "reference", torch.float64, "cuda", (1e-13, 1e-13))
