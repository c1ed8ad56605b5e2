# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""`sample` on a GPU: one pass over the logits for the log-sum-exps and the Gumbel maximum, the
noise made on the way.

Each row is cut into `PARTS` pieces, whatever the batch, so that a row's numbers don't depend on it;
a second, small kernel joins them. Its time is arithmetic, mostly the noise's, rather than memory's.
What top-k and top-p leave is found before (`cutoff_triton.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.engine.kernels.cutoff_triton import LOWEST, cutoff_rows, inverse_temperature
from retool.engine.kernels.draws import FIRST, GOLDEN, SECOND, Draws

BLOCK = 2048  # numbers of a part at a time
PARTS = 16  # of a row
STEP = (BLOCK * GOLDEN + 2**63) % 2**64 - 2**63  # of the counter from block to block, wrapped


@triton.jit
def _half_mixed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    return (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND


@triton.jit
def _mixed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    z = _half_mixed(z, FIRST, SECOND)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def _log_ratio(f):
    """log(1 + f) / f for |f| ≤ 1/3, to 3e-8 (a minimax polynomial)."""
    q = f * 0.143742213 - 0.153727228
    q = f * q + 0.139208999
    q = f * q - 0.164193539
    q = f * q + 0.200160608
    q = f * q - 0.250075986
    q = f * q + 0.333331063
    q = f * q - 0.499999402
    return f * q + 1.0


@triton.jit
def _gumbel(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """`gumbel` of a key with its counter added.

    Numbers here are normal, so a logarithm needs no special cases.

    log x = k log 2 + log m where x = 2^k m, m in [2/3, 4/3): subtracting the bits of 2/3 leaves
    2^23 k, and 8.262958e-08 is log 2 / 2^23.
    """
    # Of `_mixed` just the upper half is wanted: the last of its steps on 32 bits
    high = (_half_mixed(z, FIRST, SECOND) >> 32).to(tl.int32)
    bits = (high ^ ((high >> 31) & 1)).to(tl.uint32, bitcast=True)
    w = tl.minimum(
        bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994
    )
    k = ((1.0 - w).to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    scale = (0x3F800000 - k).to(tl.float32, bitcast=True)  # 2^−k
    f = (scale - 1.0) - w * scale  # of 1 − w, but not of its rounded value
    e = k.to(tl.float32) * -8.262958e-08 - f * _log_ratio(f)  # −log1p(−w)
    k = (e.to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    f = (e.to(tl.int32, bitcast=True) - k).to(tl.float32, bitcast=True) - 1.0
    return k.to(tl.float32) * -8.262958e-08 - f * _log_ratio(f)


@triton.jit
def _part_kernel(
    x_ptr,
    stride,
    columns,
    size,
    keys_ptr,
    positions_ptr,
    temperature_ptr,
    cutoff_ptr,
    out_ptr,
    best_ptr,
    FILTERED: tl.constexpr,
    GOLDEN: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """A part's largest x, the sums of exp(x - largest) over all and over the kept tokens, and the
    best score, with its token.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    scale = inverse_temperature(temperature)
    least = float("-inf")
    if FILTERED:
        least = tl.where(temperature == 0.0, float("-inf"), tl.load(cutoff_ptr + row))
    lanes = tl.arange(0, BLOCK)
    end = tl.minimum((part + 1) * size, columns)
    position_key = _mixed(tl.load(positions_ptr + row) * GOLDEN, FIRST, SECOND)
    key = _mixed(tl.load(keys_ptr + row) + position_key, FIRST, SECOND)
    counter = key + ((part * size).to(tl.int64) + 1) * GOLDEN
    of_lane = lanes.to(tl.int64) * GOLDEN
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    kept = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    found = tl.zeros((BLOCK,), tl.int32)  # where the block began that the best is from
    for start in range(part * size, end, BLOCK):
        x = tl.load(x_ptr + row * stride + start + lanes, start + lanes < end, other=float("-inf"))
        x *= scale
        score = x
        if temperature != 0.0:  # a greedy row needs no noise
            score = x + _gumbel(counter + of_lane, FIRST, SECOND)
        counter += STEP
        grows = x > largest
        # What the smaller of the two is worth: 0 where x is minus infinity
        e = tl.exp(-tl.abs(x - largest))
        whole = tl.where(grows, whole * e + 1.0, whole + e)
        better = score > best
        if FILTERED:
            stays = x >= least
            kept = tl.where(grows, kept * e + stays.to(tl.float32), kept + tl.where(stays, e, 0.0))
            better = better & stays
        largest = tl.maximum(largest, x)
        best = tl.where(better, score, best)
        found = tl.where(better, start, found)
    top = tl.max(largest, 0)
    share = tl.exp(largest - top)
    winner = tl.max(best, 0)
    at = row * 4 * parts + part
    tl.store(out_ptr + at, top)
    tl.store(out_ptr + at + parts, tl.sum(whole * share, 0))
    if FILTERED:
        tl.store(out_ptr + at + 2 * parts, tl.sum(kept * share, 0))
    tl.store(out_ptr + at + 3 * parts, winner)
    # Of equal scores the first token's, as argmax has it
    token = tl.min(tl.where(best == winner, found + lanes, 2147483647), 0)
    tl.store(best_ptr + row * parts + part, token)


@triton.jit
def _join_kernel(
    x_ptr,
    stride,
    temperature_ptr,
    parts_ptr,
    best_ptr,
    out_ptr,
    FILTERED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A row's token, logp and logp_behaviour of what its parts say."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    pieces = tl.arange(0, PARTS)
    at = parts_ptr + row * 4 * PARTS + pieces
    top = tl.load(at)
    whole = tl.load(at + PARTS)
    best = tl.load(at + 3 * PARTS)
    tokens = tl.load(best_ptr + row * PARTS + pieces)
    token = tl.min(tl.where(best == tl.max(best, 0), tokens, 2147483647), 0)
    temperature = tl.load(temperature_ptr + row)
    largest = tl.max(top, 0)
    share = tl.exp(top - largest)
    above = tl.load(x_ptr + row * stride + token) * inverse_temperature(temperature) - largest
    logp = above - tl.log(tl.sum(whole * share, 0))
    behaviour = logp
    if FILTERED:
        behaviour = above - tl.log(tl.sum(tl.load(at + 2 * PARTS) * share, 0))
    tl.store(out_ptr + row, token.to(tl.float32))
    tl.store(out_ptr + rows + row, logp)
    tl.store(out_ptr + 2 * rows + row, tl.where(temperature == 0.0, 0.0, behaviour))


def sample_rows(logits: Tensor, draws: Draws, filtered: bool) -> Tensor:
    """`sample` for float32 logits [R, V] on a GPU, each row contiguous."""
    rows, columns = logits.shape
    size = triton.cdiv(columns, PARTS * 16) * 16  # aligned, so that four logits are loaded at once
    stats = torch.empty(rows, 4, PARTS, device=logits.device)
    tokens = torch.empty(rows, PARTS, dtype=torch.int32, device=logits.device)
    out = torch.empty(3, rows, device=logits.device)
    least = cutoff_rows(logits, draws) if filtered else draws.temperature
    _part_kernel[(rows, PARTS)](
        logits,
        logits.stride(0),
        columns,
        size,
        draws.keys,
        draws.positions,
        draws.temperature,
        least,
        stats,
        tokens,
        FILTERED=filtered,
        GOLDEN=GOLDEN,
        STEP=STEP,
        FIRST=FIRST,
        SECOND=SECOND,
        BLOCK=BLOCK,
        LOWEST=LOWEST,
        num_warps=8,
        maxnreg=80 if filtered else 64,  # as few as spill nothing
    )
    _join_kernel[(rows,)](
        logits,
        logits.stride(0),
        draws.temperature,
        stats,
        tokens,
        out,
        FILTERED=filtered,
        PARTS=PARTS,
        num_warps=1,
    )
    return out
