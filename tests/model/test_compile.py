"""Blocks that call the kernels torch.compile made for them without torch.compile: the same results,
and never where it would have done something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import count_calls
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor.output_code import OutputCode

from retool.batch import Sample, pack
from retool.model.build import ModelOptions, build_decoder
from retool.model.compiling import graphs
from retool.model.compiling.calls import Compiled
from retool.model.compiling.pieces import compiled
from retool.model.decoder import Decoder
from retool.model.recompute import Recompute
from retool.parallel.mesh import make_mesh
from tests.model.decoders import decoder_config


class Interpreted(OutputCode):
    """A graph that runs node by node, in the place of what Inductor would make of it."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self._boxed_call = True
        self.current_callable: Callable[[list[Any]], Any] = lambda given: graph(*given)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return self.current_callable(list(inputs))

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        pass

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        pass


def as_inductor(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
    """Of a graph that computes nothing Inductor makes a plain function, too."""
    return Interpreted(graph) if count_calls(graph.graph) else make_boxed_func(graph.forward)


class Halves(nn.Module):
    """A block of two parameters, one of which only the first of two results needs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.shift = nn.Parameter(torch.randn(4, generator=generator))
        self.eps = 1e-3
        self.result_wanted = True

    def mixed(self, x_t4: Tensor, y_t4: Tensor, negative: bool = False) -> Tensor:
        out = torch.tanh(x_t4 @ self.weight + self.shift) * y_t4 / (self.eps + y_t4.square())
        return -out if negative else out

    def added(self, x_t4: Tensor, y_t4: Tensor) -> Tensor:
        return x_t4 + y_t4

    def turned(self, x_t4: Tensor) -> Tensor:
        return (2 * x_t4.t().contiguous()).t()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx_inner", as_inductor)
        yield
    torch._dynamo.reset()


class Counted:
    """A compiled function, and how often torch.compile is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.piece: Compiled = compiled(Halves.mixed)
        self.inner = self.piece.function
        self.piece.function = self.ask

    def ask(self, *arguments: Any) -> Tensor:
        self.asked += 1
        return self.inner(*arguments)

    def of(self, *arguments: Any) -> int:
        """How often for this call."""
        before = self.asked
        self.piece(*arguments)
        return self.asked - before

    def once(self, *arguments: Any) -> int:
        """The same, without compiling anything for it."""
        inner = self.inner
        self.inner = Halves.mixed
        try:
            return self.of(*arguments)
        finally:
            self.inner = inner


def rows(t: int, seed: int, **more: Any) -> Tensor:
    return torch.randn(t, 4, generator=torch.Generator().manual_seed(seed), **more)


def warmed(block: Halves) -> Counted:
    """After a forward and a backward of 8 tokens, and a forward that has seen both."""
    counted = Counted()
    x = rows(8, 1, requires_grad=True)
    counted.piece(block, x, rows(8, 2)).sum().backward()
    counted.piece(block, x, rows(8, 2))
    block.zero_grad()
    return counted


def test_a_call_again_is_the_same_without_torch_compile(interpreted: None) -> None:
    block = Halves()
    counted = warmed(block)
    x = rows(8, 3, requires_grad=True)
    y = rows(8, 4)
    wanted = [x, block.weight, block.shift]
    d_out = rows(8, 5)
    out = counted.piece(block, x, y)
    plain = block.mixed(x, y)
    torch.testing.assert_close(out, plain)
    for ours, theirs in zip(
        torch.autograd.grad(out, wanted, d_out),
        torch.autograd.grad(plain, wanted, d_out),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert counted.of(block, x, y) == 0
    with torch.no_grad():
        counted.piece(block, x, y)
        torch.testing.assert_close(counted.piece(block, x, y), plain)
        assert counted.of(block, x, y) == 0


def test_what_is_not_known_to_be_the_same_goes_through_torch_compile(interpreted: None) -> None:
    block = Halves()
    counted = warmed(block)
    x = rows(8, 3, requires_grad=True)
    y = rows(8, 4)
    longer = rows(9, 3, requires_grad=True), rows(9, 4)
    assert counted.once(block, x, y) == 0
    assert [counted.of(block, *longer), counted.of(block, *longer)] == [1, 0], "a new length, once"
    assert counted.once(block, x, y, True) == 1, "another argument"
    assert counted.once(block, x, y.t().contiguous().t()) == 1, "other strides"
    assert counted.once(block, x, rows(8, 4, requires_grad=True)) == 1, "another gradient"
    assert counted.once(block, x, rows(8, 4)[:, :1].contiguous()) == 1, "another width"
    assert counted.once(Halves(), x, y) == 1, "another block"
    block.shift.requires_grad = False
    assert counted.once(block, x, y) == 1, "a frozen parameter"
    block.shift.requires_grad = True
    block.shift.data = block.shift.data.double()
    assert counted.once(block, x, y) == 1, "a parameter of another dtype"
    block.shift.data = block.shift.data.float()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert counted.once(block, x, y) == 1, "somebody keeps what is saved"
    torch.use_deterministic_algorithms(True)
    try:
        assert counted.once(block, x, y) == 1, "another state of torch"
    finally:
        torch.use_deterministic_algorithms(False)
    assert counted.once(block, x, y) == 0


def test_kinds_that_come_in_turn_are_each_known(interpreted: None) -> None:
    block = Halves()
    counted = warmed(block)
    x = rows(8, 3)
    y = rows(8, 4)
    with torch.no_grad():
        first = [counted.of(block, x, y, negative) for negative in (False, True)]
        again = [counted.once(block, x, y, negative) for negative in (False, True, False)]
        assert (first, again) == ([1, 1], [0, 0, 0])
        torch.testing.assert_close(counted.piece(block, x, y, True), block.mixed(x, y, True))


def test_a_backward_that_computes_nothing(interpreted: None) -> None:
    block = Halves()
    piece = compiled(Halves.added)
    for _ in range(3):
        x = rows(8, 1, requires_grad=True)
        piece(block, x, rows(8, 2)).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.ones(8, 4))


def test_one_tensor_given_twice_is_not_taken_for_two(interpreted: None) -> None:
    """The compiler makes one input of it, so its graph is of no use for two."""
    block = Halves()
    counted = Counted()
    x = rows(8, 1)
    y = rows(8, 2)
    with torch.no_grad():
        counted.piece(block, x, x)
        torch.testing.assert_close(counted.piece(block, x, y), block.mixed(x, y))


def test_a_second_backward_is_refused(interpreted: None) -> None:
    block = Halves()
    counted = warmed(block)
    out = counted.piece(block, rows(8, 3, requires_grad=True), rows(8, 4)).sum()
    with pytest.raises(RuntimeError, match=r"it runs once\. Build without compilation for retain"):
        out.backward(retain_graph=True)


def test_a_result_that_lies_otherwise_goes_through_torch_compile(interpreted: None) -> None:
    """Its gradient is asked for as the result lies, and a call of ours gives it contiguous."""
    block = Halves()
    piece = compiled(Halves.turned)
    for _ in range(3):
        x = rows(8, 1, requires_grad=True)
        piece(block, x).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.full((8, 4), 2.0))
    assert not piece.calls


def test_without_a_private_part_of_torch_blocks_go_through_torch_compile(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Halves()
    piece = compiled(Halves.added)
    x, y = rows(8, 1), rows(8, 2)
    torch._dynamo.reset()
    monkeypatch.setattr(graphs, "PRIVATE_PARTS", (*graphs.PRIVATE_PARTS, "torch._C:_gone"))
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs: graph.forward)
    graphs.unknown_part.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"has no torch\._C\._gone: blocks are called through"):
            assert torch.equal(piece(block, x, y), x + y)
    finally:
        graphs.unknown_part.cache_clear()
    assert torch.equal(piece(block, x, y), x + y) and not piece.calls


def test_a_first_number_of_tokens_that_is_a_width_too(interpreted: None) -> None:
    """Its graph is any number's, and stays the one that computes it, whatever comes between."""
    torch._dynamo.reset()
    block = Halves()
    counted = Counted()
    four = rows(4, 1, requires_grad=True), rows(4, 2)
    assert [counted.of(block, *four), counted.of(block, *four)] == [1, 0]
    (first,) = counted.piece.calls.values()
    counted.of(block, rows(9, 3, requires_grad=True), rows(9, 4))
    counted.of(block, *four)
    (last,) = counted.piece.calls.values()
    assert last.graph is first.graph and first.graph.lengths == {4, 9}


def trained(recompute: Recompute, again: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Losses and gradients of four packs through a compiled decoder."""
    if not again:
        monkeypatch.setattr(Compiled, "__call__", lambda piece, block, *x: piece._through(block, x))
    config = replace(decoder_config(4, 2, vocab=31, hidden=16, ffn=24, layers=2, head_dim=4))
    options = ModelOptions(use_compile=True, recompute=recompute)
    model = build_decoder(config, make_mesh(), options)
    model.master.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    model.refresh()
    found = []
    for t in (9, 9, 12, 9):
        model.zero_grad()
        batch = pack([Sample(np.arange(t, dtype=np.int32), np.ones(t, bool))])
        loss = model(batch, lambda hidden, weight: (hidden @ weight.t()).square().sum())
        loss.backward()
        model.finish_gradients()
        found += [loss.detach(), model.grad.clone()]
    assert isinstance(model.module, Decoder)
    pieces = [piece for b in model.module.layers for piece in (b.before_piece, b.after_piece)]
    known = [isinstance(piece, Compiled) and bool(piece.calls) for piece in pieces]
    # A checkpoint keeps what is saved in its own way: `after` goes through torch.compile there
    assert all(known[::2]) == again
    assert any(known[1::2]) == all(known[1::2]) == (again and recompute != "selective")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_decoder_has_the_same_bits(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own kernels, called either way."""
    again = trained(recompute, True, monkeypatch)
    through = trained(recompute, False, monkeypatch)
    for a, b in zip(again, through, strict=True):
        assert torch.equal(a, b)
