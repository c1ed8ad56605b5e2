"""A block's compiled functions, called without torch.compile where it would do the same again.

[Note: kernels called again without torch.compile] A call of a compiled function costs the host
several times what its launches do: guards over the block's attributes, then AOTAutograd's wrappers,
forward and backward. A decoder calls the same few graphs for each of its layers. So a block keeps
which graph torch.compile chose for it, and what that graph was given: the arguments, the block's
parameters, and the number of tokens. The next call of the same kind gives them to Inductor's kernels
itself, through one autograd node. A number of tokens that no layer has had yet goes through
torch.compile first, with its guards; so does whatever isn't known to be the same.

What this rests on is looked at when a call is understood (`_understood`), and where it isn't so,
torch.compile goes on being asked:

    the graph has one result, and it is the function's      same memory, shape, strides, dtype
    each of its inputs is one of ours                        same memory, and no two of ours are alike
    the backward takes what the forward made, by name,       all names but one are known
    and the result's gradient, contiguous                    the result is contiguous
    and returns a gradient for each of the inputs            as many
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn

from retool.model.compiling.graphs import Graph, Run, looking
from retool.model.compiling.hidden import applied, unviewed


@dataclass(frozen=True)
class Call:
    """A call of a graph for one block, as torch.compile made it once.

    Of each input of the graph one of: the place of an argument, the name of a parameter, or None
    for the number of tokens.
    """

    graph: Graph
    block: nn.Module
    inputs: tuple[int | str | None, ...]
    arguments: tuple[Any, ...]  # `_kind` and the shape of a token's part of a tensor, else itself
    parameters: tuple[Any, ...]  # `_kind` of each among the inputs
    state: Any  # of torch: determinism, precision of products, …
    origins: list[int] | None

    def fits(self, block: nn.Module, arguments: Sequence[Any]) -> bool:
        """Whether torch.compile would do the same again."""
        tokens = len(arguments[0])
        return (
            block is self.block
            and tokens in self.graph.lengths
            and self.state.check()
            and self.arguments == _kinds(arguments, tokens)
            and self.parameters == _kinds_of_parameters(block, self.inputs)
        )

    def run(self, arguments: Sequence[Any]) -> Tensor:
        held = self.block._parameters
        tokens = len(arguments[0])
        inputs: list[Any] = []
        for each in self.inputs:
            if each is None:
                inputs.append(tokens)
            else:
                inputs.append(held[each] if isinstance(each, str) else arguments[each])
        if self.origins is None:
            assert self.graph.forward is not None
            return self.graph.forward(inputs)[0]
        return applied(_Replayed, self.graph, self.origins, *inputs)


class Compiled:
    """A compiled function of one block; see [Note: kernels called again without torch.compile]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # By `_kind_of`
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __call__(self, block: nn.Module, *arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self._through(block, arguments)
        kind = _kind_of(block, arguments)
        call = self.calls.get(kind)
        if call is not None and not _watched() and call.fits(block, arguments):
            return call.run(arguments)
        with looking() as runs:
            out = self._through(block, arguments)
        if len(runs) == 1 and not _watched():
            call = _understood(runs[0], block, arguments, out)
            if call is not None:
                self.calls[kind] = call
        return out

    def _through(self, block: nn.Module, arguments: Sequence[Any]) -> Tensor:
        """Through torch.compile, which would make a graph for each kind of view."""
        plain = [unviewed(a) if isinstance(a, Tensor) and a._is_view() else a for a in arguments]
        if not torch.compiler.is_compiling():
            _mark_widths(plain)
        return self.function(block, *plain)


def _mark_widths(arguments: Sequence[Any]) -> None:
    """Tell the compiler that only numbers of tokens differ from call to call.

    Where the first one is a width, too, it would take both for one size, and make a graph of this
    number alone. What came between would say which graph runs it later; two may round differently.
    """
    for each in arguments:
        if isinstance(each, Tensor):
            torch._dynamo.mark_static(each, list(range(1, each.dim())))


def _kind_of(block: nn.Module, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """With gradients or without, whether somebody reads the block's result, and what isn't a tensor:
    packs of these kinds come in turn.
    """
    others = [each for each in arguments if not isinstance(each, Tensor)]
    return torch.is_grad_enabled(), getattr(block, "result_wanted", True), *others


def _watched() -> bool:
    """Whether somebody sees each operation, or keeps what is saved for a backward in another way."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    return hooks is not None or torch._C._len_torch_dispatch_stack() > 0


def _understood(run: Run, block: nn.Module, arguments: Sequence[Any], out: Tensor) -> Call | None:
    """How the graph's inputs come from a call's; None where it can't be told."""
    from torch._C._dynamo.guards import GlobalStateGuard

    tokens = len(arguments[0])
    graph = run.graph
    if not _same(run.result, out):
        return None
    graph.lengths.add(tokens)
    kinds = _kinds(arguments, tokens)
    inputs = [_origin(each, tokens, block, arguments) for each in run.given]
    if kinds is None or -1 in inputs or not _distinct(arguments):
        return None
    origins = None
    if out.requires_grad:
        origins = graph.origins()
        if origins is None or graph.gradients != len(inputs) or not out.is_contiguous():
            return None
    parameters = _kinds_of_parameters(block, inputs)
    return Call(graph, block, tuple(inputs), kinds, parameters, GlobalStateGuard(), origins)


def _kinds(arguments: Sequence[Any], tokens: int) -> tuple[Any, ...] | None:
    """What of the arguments a graph depends on; None where they aren't whole tensors of the tokens."""
    kinds = []
    for each in arguments:
        if not isinstance(each, Tensor):
            kinds.append(each)
        elif len(each) == tokens and each.is_contiguous():
            kinds.append((*_kind(each), each.shape[1:]))
        else:
            return None
    return tuple(kinds)


def _kinds_of_parameters(block: nn.Module, inputs: Sequence[int | str | None]) -> tuple[Any, ...]:
    held = block._parameters
    return tuple(_kind(cast(Tensor, held[name])) for name in inputs if isinstance(name, str))


def _kind(x: Tensor) -> tuple[torch.dtype, bool]:
    return x.dtype, x.requires_grad


def _distinct(arguments: Sequence[Any]) -> bool:
    """Whether an argument's memory tells which one it is. The compiler takes one that is given twice
    as one input.
    """
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    return not any(_same(a, b) for a, b in combinations(tensors, 2))


def _origin(
    given: Any, tokens: int, block: nn.Module, arguments: Sequence[Any]
) -> int | str | None:
    """Where a graph's input came from, as in `Call.inputs`; -1 where nothing is it."""
    if not isinstance(given, Tensor):
        return None if given == tokens else -1
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and _same(given, argument):
            return place
    for name, parameter in block._parameters.items():
        if parameter is not None and _same(given, parameter):
            return name
    return -1


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, origins: list[int], *inputs: Any) -> Tensor:
        assert graph.forward is not None
        made = graph.forward(list(inputs))
        # What the backward will be given, with a hole where the result's gradient goes. Tensors are
        # saved, numbers of tokens are kept beside them
        taken = [None if place < 0 else made[place] for place in origins]
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in taken))
        ctx.graph = graph
        ctx.sizes = [None if isinstance(each, Tensor) else each for each in taken]
        ctx.gradient = origins.index(-1)
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
            raise RuntimeError(
                "the backward of a compiled block writes over what its forward has kept: it runs once. "
                "Build without compilation for retain_graph=True or create_graph=True."
            )
        taken = [
            size if tensor is None else tensor
            for tensor, size in zip(ctx.saved_tensors, ctx.sizes, strict=True)
        ]
        # Each is freed after its last use by the kernels, if nobody else has it
        ctx.maybe_clear_saved_tensors()
        taken[ctx.gradient] = grads[0].contiguous()
        return (None, None, *ctx.graph.backward(taken))
