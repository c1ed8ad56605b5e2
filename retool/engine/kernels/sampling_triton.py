# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""`sample` on a GPU: one pass over the logits for what each block of a row weighs, then a small
kernel that draws a block of a row and one of its tokens.

Blocks are the same whatever the batch, so that a row's numbers don't depend on it. The pass takes one
exponential a logit, which the memory's time hides. What top-k and top-p leave is found before
(`cutoff_triton.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.engine.kernels.cutoff_triton import LOWEST, cutoff_rows, inverse_temperature
from retool.engine.kernels.draws import BLOCK, FIRST, GOLDEN, SECOND, Draws

TOGETHER = 2  # blocks of a program: one leaves too little to load at once


@triton.jit
def _mass_kernel(
    x_ptr,
    stride,
    columns,
    blocks,
    temperature_ptr,
    cutoff_ptr,
    out_ptr,
    FILTERED: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """Of each block its largest x, and the sums of exp(x - largest) over all and over the kept
    tokens.
    """
    programs = tl.cdiv(blocks, TOGETHER)
    row = (tl.program_id(0) // programs).to(tl.int64)
    number = tl.program_id(0) % programs * TOGETHER + tl.arange(0, TOGETHER)
    token = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    temperature = tl.load(temperature_ptr + row)
    x = tl.load(x_ptr + row * stride + token, token < columns, other=float("-inf"))
    x *= inverse_temperature(temperature)
    largest = tl.maximum(tl.max(x, 1), LOWEST)
    weights = tl.exp(x - largest[:, None])
    at = out_ptr + row * 3 * blocks + number
    tl.store(at, largest, number < blocks)
    tl.store(at + blocks, tl.sum(weights, 1), number < blocks)
    if FILTERED:
        least = tl.where(temperature == 0.0, float("-inf"), tl.load(cutoff_ptr + row))
        kept = tl.sum(tl.where(x >= least, weights, 0.0), 1)
        tl.store(at + 2 * blocks, kept, number < blocks)


@triton.jit
def _uniform(counter, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """`uniforms`, of a counter that was multiplied already."""
    z = (counter ^ ((counter >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return (((z >> 12) & ((1 << 52) - 1)).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _picked(weights, place, uniform):
    """`picked`. The cumulated weights of a parallel scan may fall by a rounding, so that this one
    asks for a weight.
    """
    exceeds = (weights > 0.0) & (tl.cumsum(weights, 0) > uniform * tl.sum(weights, 0))
    last = tl.max(tl.where(weights > 0.0, place, 0), 0)
    return tl.min(tl.where(exceeds, place, last), 0)


@triton.jit
def _draw_kernel(
    x_ptr,
    stride,
    columns,
    blocks,
    keys_ptr,
    positions_ptr,
    temperature_ptr,
    cutoff_ptr,
    masses_ptr,
    out_ptr,
    FILTERED: tl.constexpr,
    GOLDEN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """A row's token, logp and logp_behaviour of what its blocks weigh."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    number = tl.arange(0, BLOCKS)
    at = masses_ptr + row * 3 * blocks + number
    largest = tl.load(at, number < blocks, other=LOWEST)
    whole = tl.load(at + blocks, number < blocks, other=0.0).to(tl.float64)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0.0
    counter = tl.load(keys_ptr + row) + tl.load(positions_ptr + row) * 2 * GOLDEN
    of_block = tl.where(greedy, 0.0, _uniform(counter, FIRST, SECOND))
    of_token = tl.where(greedy, 0.0, _uniform(counter + GOLDEN, FIRST, SECOND))

    top = tl.max(largest, 0)
    share = tl.exp((largest - top).to(tl.float64))
    whole *= share
    kept = whole
    if FILTERED:
        kept = share * tl.load(at + 2 * blocks, number < blocks, other=0.0).to(tl.float64)
    normal = tl.sum(kept, 0)
    is_top = (largest == top) & (number < blocks)
    block = _picked(tl.where(greedy, is_top.to(tl.float64), kept), number, of_block)

    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + token, token < columns, other=float("-inf"))
    x *= inverse_temperature(temperature)
    limit = tl.maximum(tl.max(x, 0), LOWEST)
    weights = tl.exp((x - limit).to(tl.float64))
    if FILTERED:
        weights = tl.where(x >= tl.load(cutoff_ptr + row), weights, 0.0)
    weights = tl.where(greedy, (x == limit).to(tl.float64), weights)
    drawn = tl.maximum(_picked(weights, token, of_token), block * BLOCK)

    chosen = tl.max(tl.where(token == drawn, x, float("-inf")), 0)
    above = (chosen - top).to(tl.float64)
    behaviour = tl.where(greedy, 0.0, above - tl.log(normal))
    tl.store(out_ptr + row, drawn.to(tl.float32))
    tl.store(out_ptr + rows + row, (above - tl.log(tl.sum(whole, 0))).to(tl.float32))
    tl.store(out_ptr + 2 * rows + row, behaviour.to(tl.float32))


def sample_rows(logits: Tensor, draws: Draws, filtered: bool) -> Tensor:
    """`sample` for float32 logits [R, V] on a GPU, each row contiguous."""
    rows, columns = logits.shape
    blocks = triton.cdiv(columns, BLOCK)
    masses = torch.empty(rows, 3, blocks, device=logits.device)
    out = torch.empty(3, rows, device=logits.device)
    least = cutoff_rows(logits, draws) if filtered else draws.temperature
    _mass_kernel[(rows * triton.cdiv(blocks, TOGETHER),)](
        logits,
        logits.stride(0),
        columns,
        blocks,
        draws.temperature,
        least,
        masses,
        FILTERED=filtered,
        TOGETHER=TOGETHER,
        BLOCK=BLOCK,
        LOWEST=LOWEST,
        num_warps=1,  # so that a block is summed up within a warp
        enable_fp_fusion=False,  # x is rounded before its difference, as torch has it
    )
    _draw_kernel[(rows,)](
        logits,
        logits.stride(0),
        columns,
        blocks,
        draws.keys,
        draws.positions,
        draws.temperature,
        least,
        masses,
        out,
        FILTERED=filtered,
        GOLDEN=GOLDEN,
        FIRST=FIRST,
        SECOND=SECOND,
        BLOCKS=triton.next_power_of_2(blocks),
        BLOCK=BLOCK,
        LOWEST=LOWEST,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
