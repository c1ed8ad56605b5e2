"""Causal attention over packed documents: one function, six kernels behind it.

Shapes: T tokens · N query heads · K key/value heads · G query heads per key/value head · L tokens
of a document · H head dim · B documents

    flash      FlashAttention-2, `flash_attn_varlen_func`'s kernels, from the flash-attn package
    varlen     torch's own FlashAttention-2, `torch.nn.attention.varlen`; flash3, flash4: the same
               call with FlashAttention-3 or 4 installed
    cudnn      documents of at least `CUDNN_SHORTEST` tokens through cuDNN, the shorter ones between
               them through one of those
    reference  document by document in any precision, on any device: the CPU's kernel, and what the
               others are tested against

Every token attends to itself and to the tokens before it in its document; scores are scaled by
1/sqrt(H); query head n reads key/value head n // G. Nothing waits for the device: what the host
must know of the documents is in `Pack`.

[Note: attention without running it again] A block that recomputes its activations keeps `out` and
`lse` from `attention_forward_lse` (T·N·(H + 2) elements of 2 bytes in bf16) and gives them to
`attention` as `saved` in the recomputation: it returns the kept `out`, and its backward starts from
both. The most expensive part of a long block is then never computed twice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retool.model.attention import flash as attention_flash
from retool.model.attention.cudnn import (
    CUDNN_LARGEST_HEAD,
    CUDNN_SHORTEST,
    cudnn_backward,
    cudnn_forward,
)
from retool.model.attention.pack import Attended, Gradients, Pack, new_pack
from retool.model.attention.parts import Parts
from retool.model.attention.reference import reference_backward, reference_forward
from retool.model.compiling.hidden import applied, eager

T = TypeVar("T")
CUDNN_FROM = (9, 0)  # compute capability: Hopper
TRUSTED = 0.03  # largest `kernel_error` of a kernel that is used
TRIED_WINDOW = 20  # tokens: within one of the documents that kernels are tried on
TRIED_CAP = 2.0  # of scores that are about 1
WITH_CAPS = ("flash",)  # of the fused ones


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    wanted: str = "auto",
    *,
    windowed: bool = False,
    capped: bool = False,
) -> str:
    """The kernel for these inputs: `wanted` if it can run them, or for "auto" the fastest that can
    (varlen of the fused ones under `torch.use_deterministic_algorithms(True)`). A fused kernel is
    tried on the device first, see `kernel_error`; `windowed`, `capped`: with a window or a cap of
    scores, too.

    Raises ValueError where `wanted` is unknown, can't run or computes wrongly, saying what would.
    """
    if wanted not in ("auto", *FORWARD):
        raise ValueError(
            f"attention backend {wanted!r} is not known. Use auto, {', '.join(FORWARD)}."
        )
    reason = why_not_fused(device, dtype, head_dim)
    if wanted == "reference" or (wanted == "auto" and reason):
        return "reference"
    if wanted != "auto":
        _require_possible(wanted, device, dtype, head_dim, capped)
    for backend in _fastest_first(device, head_dim, capped) if wanted == "auto" else [wanted]:
        error = kernel_error(backend, device, dtype, head_dim)
        if error <= TRUSTED and (windowed or capped):
            error = kernel_error(backend, device, dtype, head_dim, windowed, capped)
        if error <= TRUSTED:
            return backend
        wrong = (
            f"attention backend {backend!r} computes wrongly on this device with heads of {head_dim} "
            f"(relative error {error:.2g})"
        )
        if wanted != "auto":
            raise ValueError(
                f"{wrong}: its package was built for something else. Install another build, or use auto."
            )
        warnings.warn(f"{wrong}: the next one is used.", stacklevel=2)
    if capped:
        slow = "no kernel here caps attention's scores: the plain formula does, slower"
        warnings.warn(f"{slow}. flash-attn ≥ 2.6 does, built with soft-caps.", stacklevel=2)
    return "reference"


def _require_possible(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, capped: bool
) -> None:
    """ValueError where a kernel that was asked for can't take these inputs, or not as the run wants it."""
    reason = why_not(wanted, device, dtype, head_dim, capped=capped)
    if reason:
        raise ValueError(f"attention backend {wanted!r} {reason}. Use reference, or auto.")
    if wanted == "cudnn" and torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "attention backend 'cudnn' adds up gradients in no fixed order: it isn't "
            "deterministic. Use varlen or auto."
        )


def _fastest_first(device: torch.device, head_dim: int, capped: bool) -> list[str]:
    """The fused kernels for inputs that they take, as far as their kind tells."""
    flash = attention_flash.available(device)
    if capped:
        # It has a switch for the same bits, too
        return [name for name in flash if name in WITH_CAPS]
    if torch.are_deterministic_algorithms_enabled():
        return ["varlen"]
    on_hopper = torch.cuda.get_device_capability(device) >= CUDNN_FROM
    return ["cudnn"] * (on_hopper and head_dim <= CUDNN_LARGEST_HEAD) + flash


def why_not(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    there: bool = True,
    capped: bool = False,
) -> str:
    """Why the fused kernel `wanted` can't take these inputs, as far as can be known without trying
    it; empty where it can.

    `there` false: `device` is of a box that is only planned for, so nothing is known of its GPU but
    that it is one. `capped`: the model caps attention's scores.
    """
    if reason := why_not_fused(device, dtype, head_dim):
        return reason
    if capped and wanted not in WITH_CAPS:
        return "has no caps of scores, which the model asks for"
    if package := attention_flash.missing(wanted):
        return f"needs the package {package}. Install it, or use varlen, part of torch"
    if wanted == "cudnn" and head_dim > CUDNN_LARGEST_HEAD:
        return f"takes head dimensions up to {CUDNN_LARGEST_HEAD}, not {head_dim}"
    if not there:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if wanted == "cudnn" and capability < CUDNN_FROM:
        return "needs a Hopper or later GPU"
    generation = attention_flash.MADE_FOR.get(wanted, capability[0])
    if generation != capability[0]:
        return (
            f"is made for GPUs of compute capability {generation}, and this one has "
            f"{capability[0]}.{capability[1]}"
        )
    return ""


def why_not_fused(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why no fused kernel takes these inputs; empty where they do."""
    if device.type != "cuda":
        return f"needs a GPU, and this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"takes head dimensions that are multiples of 8 up to 256, not {head_dim}"
    return ""


@lru_cache
def kernel_error(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    windowed: bool = False,
    capped: bool = False,
) -> float:
    """Largest relative error (L2) of a kernel's output and gradients on a small pack of random
    numbers, against fp32: about 0.005 in bf16.

    A package may import and run, and yet be built without this head dimension or for another GPU.
    NaN where there are NaNs, infinite for one that doesn't run at all (varlen, the last, raises).
    """
    # A short document, one longer than a kernel's tile, and one token alone: where kernels go
    # wrong.
    lengths = (5, 67, 1)
    if backend == "cudnn":
        # It rounds a length up and reads along what stands behind: enough for that does
        lengths = (5, CUDNN_SHORTEST + 1, CUDNN_SHORTEST // 16)
    window = TRIED_WINDOW if windowed else 0
    pack = new_pack(lengths, device, window, TRIED_CAP if capped else 0.0)
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(sum(lengths), 6, head_dim, generator=generator).to(device, dtype)

    def computed(backend: str, heads: Tensor) -> list[Tensor]:
        q, k, v, dout = heads.split([2, 1, 1, 2], 1)
        out, lse = FORWARD[backend](q, k, v, pack)
        return [out, *BACKWARD[backend](dout.contiguous(), q, k, v, out, lse, pack)]

    with torch.no_grad():
        compute = partial(computed, backend, heads)
        last = attention_flash.missing(backend) or backend == "varlen"
        found = compute() if last else tried(compute, f"attention backend {backend!r} fails here")
        if found is None:
            return math.inf
        want = computed("reference", heads.float())
        return float(
            torch.stack(
                [(a.float() - b).norm() / b.norm() for a, b in zip(found, want, strict=True)]
            ).max()
        )


def tried(compute: Callable[[], T], failing: str) -> T | None:
    """What a kernel computes; None, with a warning that begins with `failing`, where it raises.

    Memory that runs out isn't its fault.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a package that was built for something else raises
        warnings.warn(f"{failing}: {error}", stacklevel=3)
        return None


@lru_cache
def _for_short(
    device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool = False
) -> str:
    """For the short documents of a pack: the fastest that computes rightly, varlen as the last."""
    *others, last = attention_flash.available(device)
    inputs = (device, dtype, head_dim, windowed) if windowed else (device, dtype, head_dim)
    return next((name for name in others if kernel_error(name, *inputs) <= TRUSTED), last)


@eager  # document lengths would be guards, and every pack a new graph
def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pack: Pack,
    backend: str,
    saved: Attended | None = None,
) -> Tensor:
    """Causal attention within each document → out [T, N, H] in q's dtype, differentiable.

    `backend` is a name from `choose_backend`. N must be a multiple of K. q, k, v may be views of one
    buffer, as long as H is contiguous. `saved`: what `attention_forward_lse` gave for the same q, k
    and v; then the kernel doesn't run, see [Note: attention without running it again].
    """
    check(q_TNH.shape, k_TKH.shape[1], pack)
    return applied(_Attention, q_TNH, k_TKH, v_TKH, pack, backend, saved)


def attention_forward_lse(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, pack: Pack, backend: str
) -> Attended:
    """(out [T, N, H], lse [N, T]) without a graph.

    lse is the natural log-sum-exp of each query's scaled scores: float32, or float64 for float64
    inputs.
    """
    with torch.no_grad():
        return FORWARD[backend](q_TNH, k_TKH, v_TKH, pack)


def attention_backward(
    dout_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    attended: Attended,
    pack: Pack,
    backend: str,
) -> Gradients:
    """(dq, dk, dv) of what `attention_forward_lse` computed.

    Deterministic under `torch.use_deterministic_algorithms(True)` (not cudnn).
    """
    with torch.no_grad():
        return BACKWARD[backend](dout_TNH.contiguous(), q_TNH, k_TKH, v_TKH, *attended, pack)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pack: Pack,
        backend: str,
        saved: Attended | None,
    ) -> Tensor:
        out, lse = computed_or_kept((q, k, v), pack, backend, saved)
        ctx.pack = pack
        ctx.backend = backend
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = attention_backward(dout, q, k, v, (out, lse), ctx.pack, ctx.backend)
        return *gradients, None, None, None


def computed_or_kept(parts: Parts, pack: Pack, backend: str, saved: Attended | None) -> Attended:
    """(out, lse) of q, k and v for a node of autograd: those that are known, or new ones."""
    if saved is None:
        return attention_forward_lse(*parts, pack, backend)
    out, lse = saved
    # A new tensor over the kept one's memory: the node's output, not what it was given
    return out.view_as(out), lse


def check(q_shape: Sequence[int], kv_heads: int, pack: Pack) -> None:
    """AssertionError where the shape of q [T, N, H] doesn't go with the other heads and the documents."""
    tokens = sum(pack.seqlens)
    assert q_shape[0] == tokens, f"{q_shape[0]} query tokens in documents of {tokens} tokens"
    assert q_shape[1] % kv_heads == 0, (
        f"{q_shape[1]} query heads don't group over {kv_heads} key/value heads"
    )


# ── cuDNN for the long documents, one of the above for the rest
# ──────────────────────────────────────────────────


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Attended:
    short = FORWARD[_for_short(q.device, q.dtype, q.shape[-1], pack.window > 0)]
    # cuDNN's own kernel has no windows
    return short(q, k, v, pack) if pack.window else cudnn_forward(q, k, v, pack, short)


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack
) -> Gradients:
    short = BACKWARD[_for_short(q.device, q.dtype, q.shape[-1], pack.window > 0)]
    if pack.window:
        return short(dout, q, k, v, out, lse, pack)
    return cudnn_backward(dout, q, k, v, out, lse, pack, short)


FORWARD = {**attention_flash.FORWARD, "cudnn": _cudnn_forward, "reference": reference_forward}
BACKWARD = {**attention_flash.BACKWARD, "cudnn": _cudnn_backward, "reference": reference_backward}
