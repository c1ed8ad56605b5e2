"""The experts' own products: tokens sorted by expert, then each expert's matrix on its tokens.

    x [t, D] → rows [t·k, D], sorted by expert → gate and up → weighted product → down → [t, D]

No token is dropped and no expert is padded: what an expert gets is as long as it is. Both ways of
sorting are permutations, and their backward gathers too: nothing is added up in an order that
changes from run to run.

Legend: t tokens of this rank · k experts of a token · D model · F an expert's ffn · X experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows and columns in memory must begin at multiples of so many bytes for the grouped kernel
KERNEL_ALIGNMENT = 16
# The first compute capability that it runs on: Hopper
KERNEL_CAPABILITY = (9, 0)


class Sorted(NamedTuple):
    """Where the t·k pairs of token and expert go.

    `order` [t·k]: the pairs sorted by expert, the earlier token first. `places` [t·k]: its inverse.
    `ends` int32 [X]: where each expert's rows end. `each`: k.
    """

    order: Tensor
    places: Tensor
    ends: Tensor
    each: int


def sort_by_expert(
    experts_tk: Tensor,
    count: int,
) -> Sorted:
    """Where the rows of `count` experts are, without waiting for the device."""
    flat = experts_tk.flatten()
    in_order, order = flat.sort(stable=True)
    numbers = torch.arange(count, device=flat.device)
    ends = torch.searchsorted(in_order, numbers, right=True)
    return Sorted(order, order.argsort(), ends.int(), experts_tk.shape[1])


def experts_mlp(
    x_tD: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)): [t, D] → [t, D].

    `gate_up` [X, 2·F, D] has each expert's two matrices stacked, `down` is [X, D, F].
    """
    where = sort_by_expert(experts_tk, len(gate_up))
    weights = weights_tk.flatten().index_select(0, where.order)
    out = weighted_mlps(spread(x_tD, where), weights, where.ends, gate_up, down)
    return collect(out, where)


def weighted_mlps(
    rows: Tensor,
    weights: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """Each expert's MLP on its rows, times the rows' weights: [n, D] and [n] → [n, D]."""
    gate, up = grouped(rows, gate_up, ends).chunk(2, -1)
    # The weight goes to the narrower side of `down`, so that its result isn't kept for the backward
    inner = F.silu(gate) * up * weights[:, None].to(gate.dtype)
    return grouped(inner, down, ends)


def spread(
    x_tD: Tensor,
    where: Sorted,
) -> Tensor:
    """A row for each of a token's experts, sorted by expert: [t, D] → [t·k, D]."""
    rows: Any = _Spread.apply(x_tD, where)
    return rows


def collect(
    rows: Tensor,
    where: Sorted,
) -> Tensor:
    """The sum of each token's rows: [t·k, D] → [t, D]."""
    out: Any = _Collect.apply(rows, where)
    return out


def grouped(
    rows: Tensor,
    weights_XOI: Tensor,
    ends: Tensor,
) -> Tensor:
    """Each expert's rows times its matrix, transposed: [n, I] → [n, O]; `ends` as in `Sorted`."""
    if _has_kernel(rows, weights_XOI):
        return F.grouped_mm(rows, weights_XOI.transpose(1, 2), offs=ends)
    return grouped_by_loop(rows, weights_XOI, ends)


def grouped_by_loop(
    rows: Tensor,
    weights_XOI: Tensor,
    ends: Tensor,
) -> Tensor:
    """`grouped`, an expert after the other: the reference, and what runs without a kernel.

    The host waits for `ends`.
    """
    stops = ends.tolist()
    sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    # `unbind` has one gradient for all experts, where indexing would have one of full size for each
    pairs = zip(rows.split(sizes), weights_XOI.unbind(), strict=True)
    return torch.cat([F.linear(own, weight) for own, weight in pairs])


def _has_kernel(
    rows: Tensor,
    weights: Tensor,
) -> bool:
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not len(rows):
        return False
    aligned = all(size * rows.itemsize % KERNEL_ALIGNMENT == 0 for size in weights.shape[1:])
    return aligned and torch.cuda.get_device_capability(rows.device) >= KERNEL_CAPABILITY


def _spread(
    x_tD: Tensor,
    where: Sorted,
) -> Tensor:
    return x_tD.index_select(0, where.order // where.each)


def _collect(
    rows: Tensor,
    where: Sorted,
) -> Tensor:
    by_token = rows.index_select(0, where.places)
    return by_token.view(-1, where.each, rows.shape[1]).sum(1)


class _Spread(torch.autograd.Function):
    """`spread`, whose transpose is `collect`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_tD: Tensor,
        where: Sorted,
    ) -> Tensor:
        ctx.where = where
        return _spread(x_tD, where)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_rows: Tensor
    ) -> tuple[Tensor, None]:
        return _collect(d_rows, ctx.where), None


class _Collect(torch.autograd.Function):
    """`collect`, whose transpose is `spread`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        where: Sorted,
    ) -> Tensor:
        ctx.where = where
        return _collect(rows, where)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor
    ) -> tuple[Tensor, None]:
        return _spread(d_out, ctx.where), None
