"""Rope's kernel against its formula in float64: interpreted by Triton without a GPU (pip install
triton), compiled inside a block with one.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from retool.model.compiling.pieces import compiled
from retool.model.fused.heads import turned
from retool.model.rope import rotate
from tests.interpreter import interpret

# Tokens, heads, of which turned, their size: some of a program's heads, several programs, sizes
# that are no power of two
SHAPES = ((1, 3, 2, 8), (5, 18, 16, 64), (3, 40, 36, 12))


def made(t: int, heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Heads, cos, sin, and the gradient of the result; in float64."""
    generator = torch.Generator().manual_seed(heads)
    x, flow = torch.randn(2, t, heads, dim, generator=generator, dtype=torch.float64)
    angles = torch.randn(t, dim // 2, generator=generator, dtype=torch.float64)
    return x, angles.cos(), angles.sin(), flow


def by_formula(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, flow: torch.Tensor, count: int
) -> list[torch.Tensor]:
    """The result, and the gradient of the heads."""
    leaf = x.double().detach().requires_grad_()
    turns, stays = leaf.split([count, x.shape[1] - count], 1)
    out = torch.cat([rotate(turns, cos.double(), sin.double()), stays], 1)
    return [out, *torch.autograd.grad(out, leaf, flow.double())]


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """‖a − b‖ / ‖b‖ of each."""
    pairs = zip(found, wanted, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("t", "heads", "count", "dim"), SHAPES)
def test_the_kernel_turns_as_the_formula_does(
    t: int, heads: int, count: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retool.model.fused import heads_operators as operators

    interpret(operators, monkeypatch)
    # It wraps what is compiled
    monkeypatch.setattr(operators, "wrap_triton", lambda kernel: kernel)
    # Several programs for a token, of few heads each
    monkeypatch.setattr(operators, "PAIRS", 128)
    inputs = [x.float() for x in made(t, heads, dim)]
    x, cos, sin, flow = inputs
    leaf = x.requires_grad_()
    out = operators.turned_heads(leaf, cos, sin, count, False)
    (grad,) = torch.autograd.grad(out, leaf, flow)
    assert max(errors([out, grad], by_formula(x, cos, sin, flow, count))) < 1e-6
    assert torch.equal(out[:, count:], x[:, count:]), "the others are copied"


def test_without_a_gpu_or_for_parts_of_heads_there_is_none() -> None:
    x, cos, sin, _ = made(2, 3, 8)
    assert turned(x, cos, sin, 2) is None
    assert turned(x, cos[:, :2], sin[:, :2], 2) is None


class Piece(nn.Module):
    """Of a block, for `compiled`."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        out = turned(heads, cos, sin, self.count)
        assert out is not None
        return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_a_gpu_it_is_rounded_once(dtype: torch.dtype) -> None:
    fast = compiled(Piece.forward)
    for t, heads, count, dim in (*SHAPES, (700, 48, 40, 128)):
        x, cos, sin, flow = (tensor.to("cuda") for tensor in made(t, heads, dim))
        leaf = x.to(dtype).requires_grad_()
        narrow = flow.to(dtype)
        tables = cos.float(), sin.float()
        out = fast(Piece(count), leaf, *tables)
        (grad,) = torch.autograd.grad(out, leaf, narrow)
        bound = 1e-6 if dtype == torch.float32 else 2.5e-3
        assert max(errors([out, grad], by_formula(leaf, *tables, narrow, count))) < bound
        assert torch.equal(out[:, count:], leaf[:, count:])
