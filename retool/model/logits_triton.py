# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels over the rows of a chunk of float32 logits.

One program per row; a row's start is a 64-bit offset.

[Note: gradients over logits] The gradient goes to the matrix products in bfloat16, half the logits'
size, and is written over them: with a row stride of R floats, column j's float lies at slot j and
its bfloat16 in the upper half of the row, within slot (R + j) / 2 ≥ j. A program walks its row from
the end to the start, so what it writes lies over logits it has already read. Its warps must not run
ahead of each other: a barrier parts the reads of a block from its writes. The walk backwards also
meets first what the walk forwards left in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
WARPS = 16
SCALED = 2048  # elements of a program that scales


@triton.jit
def _capped(x, cap, CAP: tl.constexpr):
    """cap · tanh(x / cap), of which Triton has no tanh; x without CAP."""
    if CAP:
        x = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap)))
    return x


@triton.jit
def _row_stats(
    x_ptr, columns, scale, cap, ENTROPY: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """(largest, Σ exp(x − largest), Σ (x − largest)·exp(x − largest)) of a row; every lane has its
    own until the end.
    """
    lanes = tl.arange(0, BLOCK)
    # Not −∞, as −∞ − −∞ is no number; half of float32's range, so that differences stay in it
    largest = tl.full((BLOCK,), -1.7e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = _capped(tl.load(x_ptr + start + lanes, inside, other=0.0), cap, CAP) * scale
        above = tl.where(inside, tl.maximum(largest, x), largest)
        # The sums are relative to the largest so far: a larger one scales them down
        decay = tl.exp(largest - above)
        e = tl.where(inside, tl.exp(x - above), 0.0)
        if ENTROPY:
            weighted = (weighted + total * (largest - above)) * decay + e * (x - above)
        total = total * decay + e
        largest = above
    top = tl.max(largest, 0)
    share = tl.exp(largest - top)
    return top, tl.sum(total * share, 0), tl.sum((weighted + total * (largest - top)) * share, 0)


@triton.jit
def _update_kernel(
    x_ptr,
    stride,
    columns,
    labels_ptr,
    scale,
    cap,
    largest_ptr,
    total_ptr,
    weighted_ptr,
    picked_ptr,
    ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    top, total, weighted = _row_stats(x_ptr, columns, scale, cap, ENTROPY, CAP, BLOCK)
    before = tl.load(largest_ptr + row)
    largest = tl.maximum(before, top)
    old = tl.exp(before - largest)
    new = tl.exp(top - largest)
    total_before = tl.load(total_ptr + row)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total_before * old + total * new)
    if ENTROPY:
        weighted_before = tl.load(weighted_ptr + row) + total_before * (before - largest)
        tl.store(
            weighted_ptr + row, weighted_before * old + (weighted + total * (top - largest)) * new
        )
    label = tl.load(labels_ptr + row)
    here = (label >= 0) & (label < columns)
    picked = _capped(tl.load(x_ptr + label, here, other=0.0), cap, CAP)
    # Only where the label is in this chunk of the vocabulary: another chunk's stays
    tl.store(picked_ptr + row, picked * scale, here)


@triton.jit
def _write_gradient(
    x_ptr,
    out_ptr,
    columns,
    label,
    scale,
    cap,
    lse,
    entropy,
    g_logp,
    g_entropy,
    ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(columns, BLOCK)
    for i in range(blocks):
        column = (blocks - 1 - i) * BLOCK + lanes
        inside = column < columns
        x = _capped(tl.load(x_ptr + column, inside, other=0.0), cap, CAP)
        log_p = x * scale - lse
        tl.debug_barrier()  # see [Note: gradients over logits]
        flow = tl.full((BLOCK,), 0.0, tl.float32) + g_logp
        if ENTROPY:
            # ∂H/∂x = −p · (log p + H)
            flow += g_entropy * (log_p + entropy)
        # ∂ log p(label)/∂x = [column is the label] − p
        out = tl.where(column == label, g_logp, 0.0) - flow * tl.exp(log_p)
        if CAP:
            # tanh's derivative, from the capped value: 1 − tanh²
            out *= 1.0 - (x / cap) * (x / cap)
        tl.store(out_ptr + column, (out * scale).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _gradient_kernel(
    x_ptr,
    stride,
    out_ptr,
    out_stride,
    columns,
    labels_ptr,
    scale,
    cap,
    lse_ptr,
    entropy_ptr,
    g_logp_ptr,
    g_entropy_ptr,
    ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entropy = 0.0
    g_entropy = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        g_entropy = tl.load(g_entropy_ptr + row)
    _write_gradient(
        x_ptr + row * stride,
        out_ptr + row * out_stride,
        columns,
        tl.load(labels_ptr + row),
        scale,
        cap,
        tl.load(lse_ptr + row),
        entropy,
        tl.load(g_logp_ptr + row),
        g_entropy,
        ENTROPY,
        CAP,
        BLOCK,
    )


@triton.jit
def _softmax_gradient_kernel(
    x_ptr,
    stride,
    out_ptr,
    out_stride,
    columns,
    labels_ptr,
    weights_ptr,
    logp_ptr,
    cap,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    out_ptr += row * out_stride
    weight = tl.load(weights_ptr + row)
    if weight == 0.0:  # an untrained token: nothing of its row is read
        lanes = tl.arange(0, BLOCK)
        for start in range(0, columns, BLOCK):
            tl.store(
                out_ptr + start + lanes,
                tl.zeros((BLOCK,), out_ptr.dtype.element_ty),
                start + lanes < columns,
            )
    else:
        label = tl.load(labels_ptr + row)
        here = (label >= 0) & (label < columns)
        # A label that is no column shows as NaN, not as a loss that looks sound
        picked = _capped(tl.load(x_ptr + label, here, other=float("nan")), cap, CAP)
        top, total, _ = _row_stats(x_ptr, columns, 1.0, cap, False, CAP, BLOCK)
        lse = top + tl.log(total)
        tl.store(logp_ptr + row, picked - lse)
        _write_gradient(
            x_ptr, out_ptr, columns, label, 1.0, cap, lse, 0.0, weight, 0.0, False, CAP, BLOCK
        )


def update_rows(
    stats: Tensor, logits: Tensor, labels: Tensor, scale: float, entropy: bool, cap: float
) -> None:
    _update_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        logits.shape[1],
        labels,
        scale,
        cap,
        *stats,
        ENTROPY=entropy,
        CAP=cap > 0,
        BLOCK=BLOCK,
        num_warps=WARPS,
        num_stages=1,
    )


def _gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient goes: over the logits themselves in float32, else in the upper half of
    each row's memory.
    """
    if dtype == torch.float32:
        return logits
    rows, columns = logits.shape
    stride = logits.stride(0)
    # The upper half of each row begins at a multiple of 16 bytes then
    assert dtype.itemsize == 2 and stride % 8 == 0
    return torch.as_strided(
        logits.view(dtype), (rows, columns), (2 * stride, 1), 2 * logits.storage_offset() + stride
    )


def gradient_rows(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    lse: Tensor,
    entropy: Tensor | None,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    dtype: torch.dtype,
    cap: float,
) -> Tensor:
    out = _gradient_view(logits, dtype)
    with_entropy = entropy is not None and g_entropy is not None
    _gradient_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        out,
        out.stride(0),
        logits.shape[1],
        labels,
        scale,
        cap,
        lse,
        entropy if with_entropy else lse,
        g_logp,
        g_entropy if with_entropy else lse,
        ENTROPY=with_entropy,
        CAP=cap > 0,
        BLOCK=BLOCK,
        num_warps=WARPS,
        num_stages=1,
    )
    return out


def softmax_gradient_rows(
    logits: Tensor, labels: Tensor, weights: Tensor, logp: Tensor, dtype: torch.dtype, cap: float
) -> Tensor:
    out = _gradient_view(logits, dtype)
    _softmax_gradient_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        out,
        out.stride(0),
        logits.shape[1],
        labels,
        weights,
        logp,
        cap,
        CAP=cap > 0,
        BLOCK=BLOCK,
        num_warps=WARPS,
        num_stages=1,
    )
    return out


@triton.jit
def _scaled_kernel(x_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    x = tl.load(x_ptr + places, inside, other=0.0)
    out = x * tl.load(factor_ptr)
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), inside)


def scaled_elements(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Where torch writes another dtype than it reads, it moves one element at a time: 2.4 ms for 8B's
    head on an H200.
    """
    assert x.is_contiguous() and factor.dtype == x.dtype
    out = torch.empty_like(x, dtype=dtype)
    _scaled_kernel[(triton.cdiv(x.numel(), SCALED),)](
        x, factor, out, x.numel(), BLOCK=SCALED, num_warps=4
    )
    return out
