# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""`sample` on a GPU: one pass over the logits for the log-sum-exps and the Gumbel maximum, the noise made on the way.

Each row is cut into `PARTS` pieces, whatever the batch, so that a row's numbers don't depend on it. The cutoff of top-k and top-p is
found by bisection over the floats' order, 32 passes that mostly meet the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.rl.engine.sampling import FIRST, GOLDEN, SECOND, Draws, row_keys

BLOCK = 2048
PARTS = 16
FILTER_BLOCK = 8192
LOWEST = -3.0e38


@triton.jit
def _mixed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def _gumbel(key, column, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    z = _mixed(key + (column + 1).to(tl.int64) * GOLDEN, FIRST, SECOND)
    w = (((z >> 32) & 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = tl.minimum(w, 0.99999994)
    e = tl.where(w < 0.001, w * (1.0 + w * (0.5 + w * 0.33333334)), -tl.log(1.0 - w))  # −log1p(−w)
    return -tl.log(e)


@triton.jit
def _part_kernel(
    x_ptr, stride, columns, size, keys_ptr, temperature_ptr, cutoff_ptr, out_ptr, best_ptr, rows,
    FILTERED: tl.constexpr, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0.0
    scale = tl.where(greedy, 1.0, 1.0 / tl.where(greedy, 1.0, temperature))
    key = tl.load(keys_ptr + row)
    least = LOWEST
    if FILTERED:
        least = tl.where(greedy, LOWEST, tl.load(cutoff_ptr + row))
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    kept = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    for start in range(part * size, (part + 1) * size, BLOCK):
        column = start + lanes
        inside = (column < columns) & (column < (part + 1) * size)
        x = tl.load(x_ptr + row * stride + column, inside, other=LOWEST) * scale
        inside = inside & (x > LOWEST)
        grows = inside & (x > largest)
        e = tl.exp(-tl.abs(x - largest))  # what the smaller of the two is worth
        whole = tl.where(grows, whole * e + 1.0, whole + tl.where(inside, e, 0.0))
        stays = inside
        if FILTERED:
            stays = inside & (x >= least)
            kept = tl.where(grows, kept * e + stays.to(tl.float32), kept + tl.where(stays, e, 0.0))
        largest = tl.where(grows, x, largest)
        score = x + tl.where(greedy, 0.0, _gumbel(key, column, GOLDEN, FIRST, SECOND))
        better = stays & (score > best)
        best = tl.where(better, score, best)
        token = tl.where(better, column, token)
    top = tl.max(largest, 0)
    share = tl.exp(largest - top)
    winner = tl.max(best, 0)
    first = tl.min(tl.where(best == winner, token, 2147483647), 0)
    at = row * parts + part
    tl.store(out_ptr + at, top)
    tl.store(out_ptr + rows * parts + at, tl.sum(whole * share, 0))
    tl.store(out_ptr + 2 * rows * parts + at, tl.sum((kept if FILTERED else whole) * share, 0))
    tl.store(out_ptr + 3 * rows * parts + at, winner)
    tl.store(best_ptr + at, first)


@triton.jit
def _ordered(x):
    """float32 → int32 of the same order."""
    i = x.to(tl.int32, bitcast=True)
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i)


@triton.jit
def _cutoff_kernel(x_ptr, stride, columns, temperature_ptr, top_k_ptr, top_p_ptr, out_ptr, BLOCK: tl.constexpr, LOWEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    scale = 1.0 / tl.where(temperature == 0.0, 1.0, temperature)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    for start in range(0, columns, BLOCK):
        x = tl.load(x_ptr + start + lanes, start + lanes < columns, other=LOWEST)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0) * scale
    lowest = (_ordered(top) * 0).to(tl.int64) - 2139095041  # the place of minus infinity
    if top_k > 0 and top_k < columns:
        high = _ordered(top).to(tl.int64)
        while lowest < high:  # the largest place at which at least top_k tokens are kept
            middle = (lowest + high + 1) >> 1
            count = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, columns, BLOCK):
                inside = start + lanes < columns
                x = tl.load(x_ptr + start + lanes, inside, other=LOWEST) * scale
                count += (inside & (_ordered(x).to(tl.int64) >= middle)).to(tl.int32)
            enough = tl.sum(count, 0) >= top_k
            lowest = tl.where(enough, middle, lowest)
            high = tl.where(enough, high, middle - 1)
    if top_p < 1.0:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            inside = start + lanes < columns
            x = tl.load(x_ptr + start + lanes, inside, other=LOWEST) * scale
            total += tl.where(inside & (_ordered(x).to(tl.int64) >= lowest), tl.exp(x - top), 0.0)
        wanted = top_p * tl.sum(total, 0)
        high = _ordered(top).to(tl.int64)
        while lowest < high:  # the largest place at which the kept share reaches top_p
            middle = (lowest + high + 1) >> 1
            share = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, columns, BLOCK):
                inside = start + lanes < columns
                x = tl.load(x_ptr + start + lanes, inside, other=LOWEST) * scale
                share += tl.where(inside & (_ordered(x).to(tl.int64) >= middle), tl.exp(x - top), 0.0)
            enough = tl.sum(share, 0) >= wanted
            lowest = tl.where(enough, middle, lowest)
            high = tl.where(enough, high, middle - 1)
    i = lowest.to(tl.int32)
    i = tl.where(i < 0, i ^ 0x7FFFFFFF, i)
    tl.store(out_ptr + row, i.to(tl.float32, bitcast=True))


def cutoff_rows(logits: Tensor, draws: Draws) -> Tensor:
    """`cutoff` of logits / temperature, float32 [R]; nothing is sorted or written but the result."""
    out = torch.empty(len(logits), device=logits.device)
    _cutoff_kernel[(len(logits),)](
        logits, logits.stride(0), logits.shape[1], draws.temperature, draws.top_k, draws.top_p, out,
        BLOCK=FILTER_BLOCK, LOWEST=LOWEST, num_warps=16,
    )  # fmt: skip
    return out


def sample_rows(logits: Tensor, draws: Draws, filtered: bool) -> Tensor:
    """`sample` for float32 logits [R, V] on a GPU, each row contiguous."""
    rows, columns = logits.shape
    size = triton.cdiv(columns, PARTS)
    stats = torch.empty(4, rows, PARTS, device=logits.device)
    tokens = torch.empty(rows, PARTS, dtype=torch.int32, device=logits.device)
    least = cutoff_rows(logits, draws) if filtered else draws.temperature
    _part_kernel[(rows, PARTS)](
        logits, logits.stride(0), columns, size, row_keys(draws), draws.temperature, least, stats, tokens, rows,
        FILTERED=filtered, GOLDEN=GOLDEN, FIRST=FIRST, SECOND=SECOND, BLOCK=BLOCK, LOWEST=LOWEST, num_warps=8,
    )  # fmt: skip
    top, whole, kept, best = stats
    winner = best.argmax(-1, keepdim=True)
    token = tokens.gather(1, winner)
    greedy = draws.temperature == 0
    x = logits.gather(1, token.long())[:, 0] * torch.where(greedy, 1.0, 1.0 / draws.temperature)
    largest = top.amax(-1, keepdim=True)
    share = (top - largest).exp()
    above = x - largest[:, 0]
    behaviour = torch.where(greedy, 0.0, above - (kept * share).sum(-1).log())
    return torch.stack([token[:, 0].float(), above - (whole * share).sum(-1).log(), behaviour])
