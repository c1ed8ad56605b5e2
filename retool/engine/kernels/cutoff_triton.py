# ruff: noqa: ANN001, ANN201, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""The cutoff of top-k and top-p on a GPU, searched for in passes over the row that mostly meet the
cache: nothing is sorted, and nothing is written but the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.engine.kernels.draws import Draws

BLOCK = 2048  # numbers of a row at a time
LOWEST = -3.0e38  # stands for minus infinity where differences are taken


@triton.jit
def inverse_temperature(temperature):
    """What logits are multiplied by; 1 for temperature 0. Rounded as torch's division is."""
    return tl.div_rn(1.0, tl.where(temperature == 0.0, 1.0, temperature))


@triton.jit
def _below(x):
    """The next smaller float32."""
    i = x.to(tl.int32, bitcast=True)
    i = tl.where(i < 0, i ^ 0x7FFFFFFF, i) - 1
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    x_ptr,
    columns,
    scale,
    top,
    low,
    high,
    wanted,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """The largest of the row's x whose equals and betters weigh at least `wanted` together.

    Each x weighs 1, or exp(x - top) with SHARES. The result lies in [low, high]. A pass over the row
    weighs at three places in between, which leaves a quarter, cut to the x that are in it: 2 or 3
    passes for the logits of a trained model, about 10 for random ones.
    """
    lanes = tl.arange(0, BLOCK)
    passes = 0
    while (low < high) & (passes < 64):
        width = tl.minimum(high - low, -LOWEST)
        first = low + width * 0.25
        second = low + width * 0.5
        third = low + width * 0.75
        above_first = tl.zeros((BLOCK,), tl.float32)
        above_second = tl.zeros((BLOCK,), tl.float32)
        above_third = tl.zeros((BLOCK,), tl.float32)
        smallest = tl.full((BLOCK,), -LOWEST, tl.float32)
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        for start in range(0, columns, BLOCK):
            x = tl.load(x_ptr + start + lanes, start + lanes < columns, other=float("-inf")) * scale
            weight = tl.exp(x - top) if SHARES else tl.full((BLOCK,), 1.0, tl.float32)
            above_first += tl.where(x >= first, weight, 0.0)
            above_second += tl.where(x >= second, weight, 0.0)
            above_third += tl.where(x >= third, weight, 0.0)
            smallest = tl.minimum(smallest, tl.where(x >= low, x, -LOWEST))
            largest = tl.maximum(largest, tl.where(x <= high, x, LOWEST))
        one = tl.sum(above_first, 0) >= wanted
        two = tl.sum(above_second, 0) >= wanted
        three = tl.sum(above_third, 0) >= wanted
        at = tl.where(three, third, tl.where(two, second, tl.where(one, first, low)))
        end = tl.where(three, high, _below(tl.where(two, third, tl.where(one, second, first))))
        low = tl.maximum(at, tl.min(smallest, 0))
        high = tl.minimum(end, tl.max(largest, 0))
        passes += 1
    return low


@triton.jit
def _cutoff_kernel(
    x_ptr,
    stride,
    columns,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    out_ptr,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    scale = inverse_temperature(temperature)
    lanes = tl.arange(0, BLOCK)
    least = float("-inf")
    if (top_k > 0 and top_k < columns) or top_p < 1.0:
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        smallest = tl.full((BLOCK,), -LOWEST, tl.float32)
        count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, columns, BLOCK):
            x = tl.load(x_ptr + start + lanes, start + lanes < columns, other=float("-inf")) * scale
            finite = x > LOWEST
            largest = tl.maximum(largest, x)
            smallest = tl.minimum(smallest, tl.where(finite, x, -LOWEST))
            count += finite.to(tl.int32)
        top = tl.max(largest, 0)
        if top_k > 0 and top_k < tl.sum(count, 0):
            least = _search(
                x_ptr,
                columns,
                scale,
                top,
                tl.min(smallest, 0),
                top,
                top_k.to(tl.float32),
                False,
                BLOCK,
                LOWEST,
            )
        if top_p < 1.0:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, columns, BLOCK):
                x = (
                    tl.load(x_ptr + start + lanes, start + lanes < columns, other=float("-inf"))
                    * scale
                )
                total += tl.where(x >= least, tl.exp(x - top), 0.0)
            whole = tl.sum(total, 0)
            # What is worth less than this is worth less than 1 - top_p together
            little = (1.0 - top_p) * whole / columns
            low = tl.maximum(tl.maximum(least, tl.min(smallest, 0)), top + tl.log(little) - 1.0)
            least = _search(
                x_ptr, columns, scale, top, low, top, top_p * whole, True, BLOCK, LOWEST
            )
    tl.store(out_ptr + row, least)


def cutoff_rows(logits: Tensor, draws: Draws) -> Tensor:
    """`cutoff` of logits / temperature, float32 [R]."""
    out = torch.empty(len(logits), device=logits.device)
    _cutoff_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        logits.shape[1],
        draws.temperature,
        draws.top_k,
        draws.top_p,
        out,
        BLOCK=BLOCK,
        LOWEST=LOWEST,
        num_warps=16,
    )
    return out
