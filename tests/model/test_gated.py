"""The gated MLP's kernels against its formula in float64: interpreted by Triton without a GPU (pip
install triton), compiled inside a block with one.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retool.model.compiling.pieces import compiled
from retool.model.fused.gated import ACTIVATIONS, Activation, gated_down
from tests.interpreter import interpret

# Tokens, F, D: a part of a program's columns, one program's, several rows of several
SHAPES = ((1, 5, 3), (3, 64, 8), (4, 1300, 8))
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def made(t: int, width: int, hidden: int) -> Inputs:
    """Gate and up, down, its bias, and the gradient of the result; in float64."""
    generator = torch.Generator().manual_seed(width)
    shapes = ((t, 2 * width), (hidden, width), (hidden,), (t, hidden))
    gate_up, down, bias, flow = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return gate_up, down, bias, flow


def by_formula(inputs: Inputs, activation: Activation) -> list[torch.Tensor]:
    """The result and the gradients of gate and up, down and bias."""
    *leaves, flow = inputs
    gate_up, down, bias = (leaf.double().detach().requires_grad_() for leaf in leaves)
    gate, up = gate_up.chunk(2, -1)
    gated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    out = (gated * up) @ down.t() + bias
    grads = torch.autograd.grad(out, [gate_up, down, bias], flow.double())
    return [out, *grads]


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """‖a − b‖ / ‖b‖ of each."""
    pairs = zip(found, wanted, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_do_what_the_formula_says(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retool.model.fused import gated_operators as operators

    interpret(operators, monkeypatch)
    # It wraps what is compiled
    monkeypatch.setattr(operators, "wrap_triton", lambda kernel: kernel)
    for shape in SHAPES:
        inputs = made(*shape)
        *leaves, flow = (x.float() for x in inputs)
        gate_up, down, bias = (leaf.requires_grad_() for leaf in leaves)
        arguments = (gate_up, down, bias, activation == "gelu_tanh")
        out = operators.fused_gated_down(*arguments, True)
        grads = torch.autograd.grad(out, [gate_up, down, bias], flow)
        wanted = by_formula(inputs, activation)
        assert max(errors([out, *grads], wanted)) < 1e-6, shape
        unread = operators.fused_gated_down(*arguments, False)
        assert unread.shape == out.shape
        same = torch.autograd.grad(unread, [gate_up, down, bias], flow)
        assert all(map(torch.equal, same, grads)), "it doesn't need the result"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_gpu_it_is_torchs_own_operations(activation: Activation) -> None:
    inputs = made(*SHAPES[1])
    *leaves, flow = inputs
    gate_up, down, bias = (leaf.requires_grad_() for leaf in leaves)
    out = gated_down(gate_up, down, bias, activation)
    grads = torch.autograd.grad(out, [gate_up, down, bias], flow)
    assert max(errors([out, *grads], by_formula(inputs, activation))) < 1e-14


class Piece(nn.Module):
    """Of a block, with neighbours that the compiler fuses."""

    def __init__(self, down: torch.Tensor, bias: torch.Tensor, activation: Activation) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.bias = nn.Parameter(bias)
        self.activation: Activation = activation
        self.result_wanted = True

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        halved = gate_up * 0.5
        wanted = self.result_wanted
        return 2.0 * gated_down(halved, self.down, self.bias, self.activation, wanted=wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_a_gpu_it_is_as_exact_as_torchs_own(
    dtype: torch.dtype, activation: Activation
) -> None:
    """About as far from float64 as torch's own operations are; and the product isn't kept."""
    fast = compiled(Piece.forward)
    for shape in ((1, 64, 8), (300, 1300, 64), (4096, 4864, 896)):
        inputs = [x.to("cuda", dtype) for x in made(*shape)]
        gate_up, down, bias, flow = inputs
        gate_up.requires_grad_()
        piece = Piece(down, bias, activation)
        leaves = [gate_up, piece.down, piece.bias]
        halved = (0.5 * gate_up.detach(), down, bias, 2.0 * flow)
        wanted = by_formula(halved, activation)
        # By the rule of the chain; halves and doubles are exact
        wanted[:2] = [2.0 * wanted[0], 0.5 * wanted[1]]
        before = torch.cuda.memory_allocated()
        out = fast(piece, gate_up)
        kept = torch.cuda.memory_allocated() - before
        grads = torch.autograd.grad(out, leaves, flow)
        piece.result_wanted = False
        same = torch.autograd.grad(fast(piece, gate_up), leaves, flow)
        assert all(map(torch.equal, same, grads)), (shape, "they don't need the result")
        piece.result_wanted = True
        plain = piece(gate_up)
        plain_grads = torch.autograd.grad(plain, leaves, flow)
        ours = errors([out, *grads], wanted)
        theirs = errors([plain, *plain_grads], wanted)
        for mine, its in zip(ours, theirs, strict=True):
            # The compiler may round once more before it adds the bias
            assert mine < 1.5 * its + 1e-6, (shape, ours, theirs)
        # The result and half of gate and up; the product would be as large as half of that
        without_product = out.numel() + gate_up.numel()
        assert kept < (without_product + gate_up.numel() / 4) * dtype.itemsize + 4096, shape
