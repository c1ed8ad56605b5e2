# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false
"""`gated.gated_down` as an operator that the compiler looks into: Triton kernels and products.

[Note: the product is made again] down's weight gradient needs act(gate) · up. Its backward reads gate, up
and the product's gradient anyway, so it writes the product over that gradient, in the same pass: 6
numbers are moved for each of t·F where keeping it would move 5, and a layer keeps a third less of its MLP.
The compiler's own kernel moves 8, as it reads its inputs for each half of the result.

Legend: t tokens of this rank · F ffn, W in kernels · D model · G = 2·F: gate's columns, then up's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_autograd, triton_op, wrap_triton

BLOCK = 1024  # columns of a program
WARPS = 4


@triton.jit
def _gate(
    x,
    GELU: tl.constexpr,
):
    """(act(x), its slope). Both activations are x · σ(z): z is x for silu, 2·√(2/π)·(x + 0.044715·x³)
    for gelu, where 2·σ(2·y) − 1 is tanh(y).
    """
    z = x
    steepness = 1.0
    if GELU:
        square = x * x
        z = 1.5957691216057308 * x
        z *= 1.0 + 0.044715 * square
        steepness = 1.5957691216057308
        steepness *= 1.0 + 0.134145 * square
    share = tl.sigmoid(z)
    activated = x * share
    slope = share + activated * (1.0 - share) * steepness
    return activated, slope


@triton.jit
def _place(
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(row, columns, whether they are inside) of this program; a row's start may exceed 32 bits."""
    parts: tl.constexpr = tl.cdiv(W, BLOCK)
    program = tl.program_id(0)
    row = program // parts
    start = (program % parts) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    return row.to(tl.int64), columns, columns < W


@triton.jit
def _loaded(
    ptr,
    inside,
):
    return tl.load(ptr, inside, other=0.0).to(tl.float32)


@triton.jit
def _stored(
    ptr,
    values,
    inside,
):
    kind = ptr.dtype.element_ty
    tl.store(ptr, values.to(kind), inside)


@triton.jit
def _gated_forward(
    gate_up_ptr,
    out_ptr,
    W: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns, inside = _place(W, BLOCK)
    gate_ptr = gate_up_ptr + row * (2 * W) + columns
    gate = _loaded(gate_ptr, inside)
    up = _loaded(gate_ptr + W, inside)
    activated, _ = _gate(gate, GELU)
    _stored(out_ptr + row * W + columns, activated * up, inside)


@triton.jit
def _gated_backward(
    gate_up_ptr,
    product_ptr,
    out_ptr,
    W: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns, inside = _place(W, BLOCK)
    gate_ptr = gate_up_ptr + row * (2 * W) + columns
    gate = _loaded(gate_ptr, inside)
    up = _loaded(gate_ptr + W, inside)
    product_ptr += row * W + columns
    flow = _loaded(product_ptr, inside)
    activated, slope = _gate(gate, GELU)
    # Over the gradient, of which every number is read by the program that writes there
    _stored(product_ptr, activated * up, inside)
    out_ptr += row * (2 * W) + columns
    _stored(out_ptr, flow * up * slope, inside)
    _stored(out_ptr + W, flow * activated, inside)


def gated_product(
    gate_up_tG: Tensor,
    gelu: bool,
) -> Tensor:
    """act(gate) · up: [t, 2·F] → [t, F], rounded once."""
    t, both = gate_up_tG.shape
    width = both // 2
    out = gate_up_tG.new_empty((t, width))
    programs = (t * triton.cdiv(width, BLOCK),)
    wrap_triton(_gated_forward)[programs](
        gate_up_tG,
        out,
        W=width,
        GELU=gelu,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out


@triton_op("retool::gated_gradient", mutates_args={"flow_tF"})
def gated_gradient(
    gate_up_tG: Tensor,
    flow_tF: Tensor,
    gelu: bool,
) -> Tensor:
    """The gradient of gate and up [t, 2·F], from their product's, `flow_tF`, which becomes the product.

    See [Note: the product is made again].
    """
    t, width = flow_tF.shape
    out = torch.empty_like(gate_up_tG)
    programs = (t * triton.cdiv(width, BLOCK),)
    wrap_triton(_gated_backward)[programs](
        gate_up_tG,
        flow_tF,
        out,
        W=width,
        GELU=gelu,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out


@triton_op("retool::gated_down", mutates_args=())
def fused_gated_down(
    gate_up_tG: Tensor,
    down: Tensor,
    bias: Tensor | None,
    gelu: bool,
    wanted: bool,
) -> Tensor:
    """`gated.gated_down`; gelu or silu."""
    if not wanted:
        t = gate_up_tG.shape[0]
        return gate_up_tG.new_empty((t, down.shape[0]))
    product_tF = gated_product(gate_up_tG, gelu)
    return F.linear(product_tF, down, bias)


def _keep(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> None:
    del output
    gate_up_tG, down, _, gelu, _ = inputs
    ctx.save_for_backward(gate_up_tG, down)
    ctx.gelu = gelu


def _backward(
    ctx: Any,
    d_out_tD: Tensor,
) -> tuple[Tensor | None, ...]:
    gate_up_tG, down = ctx.saved_tensors
    product_tF = d_out_tD @ down  # its gradient, until the next line
    d_gate_up_tG = gated_gradient(gate_up_tG, product_tF, ctx.gelu)
    d_down = d_out_tD.t() @ product_tF
    d_bias = None
    if ctx.needs_input_grad[2]:
        d_bias = d_out_tD.sum(0)
    return d_gate_up_tG, d_down, d_bias, None, None


register_autograd("retool::gated_down", _backward, setup_context=_keep)
