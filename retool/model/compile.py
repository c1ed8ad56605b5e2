"""What is handed to torch.compile, what is hidden from it, and how its results are called.

[Note: kernels called again without torch.compile] A call of a compiled function costs the host
several times what its launches do: guards over the block's attributes, then AOTAutograd's wrappers,
forward and backward. A decoder calls the same few graphs for each of its layers. So a block keeps
which graph torch.compile chose for it, and what that graph was given: the arguments, the block's
parameters, and the number of tokens. The next call of the same kind gives them to Inductor's kernels
itself, through one autograd node. A number of tokens that no layer has had yet goes through
torch.compile first, with its guards; so does whatever isn't known to be the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import GlobalStateGuard

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[[list[Any]], Sequence[Any]]  # Inductor's; it empties the list that it is given

# Several models, dtypes and layouts may share a process; torch's own limit of 8 would end the run.
MAX_GRAPHS_OF_A_FUNCTION = 64


def compiled(function: Callable[..., Any]) -> Compiled:
    """The function through torch.compile: a block's, called with it and with tensors of its tokens.

    It makes a graph for any length and one for length 1, each with gradients and without, for all
    layers and models of one shape.
    """
    _let_in_many()
    fast = torch.compile(function, dynamic=True, fullgraph=True, backend=_noted)
    # A norm's epsilon is a constant: torch would make a tensor of it for each call
    constants = torch._dynamo.config.patch(specialize_float=True)
    return Compiled(constants(fast))


def compiled_pieces(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile alone: what reaches over two blocks, or gives several
    tensors, for a forward without gradients.

    It makes a graph for any length and one for length 1, as `compiled` does.
    """
    _let_in_many()
    return torch.compile(function, dynamic=True, fullgraph=True)


def _let_in_many() -> None:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS_OF_A_FUNCTION)


def eager(function: Function) -> Function:
    """`torch.compiler.disable`, with the signature kept.

    For functions whose arguments on the host, document lengths say, would each be a graph.
    """
    return cast(Function, torch.compiler.disable(function))


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, past what that does for torch.func, which looks at each argument."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*arguments)


def unviewed(x: torch.Tensor) -> torch.Tensor:
    """The same memory, but no view to the compiler: it makes a graph for each kind of view."""
    return torch.ops.aten._unsafe_view(x, x.shape)


# --- what torch.compile makes, noted on the way ---


@dataclass(eq=False)
class Graph:
    """A graph's kernels, and the names of what goes from one to the other.

    `forward` returns the result and what its backward needs, by the names in `made`; `backward`
    takes what has the names in `taken`, the result's gradient among them, and returns a gradient
    for each input of `forward`.
    """

    forward: Kernel | None = None
    made: list[str] = field(default_factory=list)
    backward: Kernel | None = None
    taken: list[str] = field(default_factory=list)
    gradients: int = 0
    # Numbers of tokens that torch.compile's guards have let in
    lengths: set[int] = field(default_factory=set)

    def origins(self) -> list[int] | None:
        """Of each that the backward takes its place in what the forward made, -1 of the result's
        gradient; None where it isn't so.
        """
        places = {name: place for place, name in enumerate(self.made)}
        origins = [places.get(name, -1) for name in self.taken]
        return origins if origins.count(-1) == 1 else None


class _Last(threading.local):
    """While this thread looks: the graph whose forward it has run last, what that was given, and what
    it made first.
    """

    looks: bool = False
    graph: Graph | None = None
    given: Sequence[Any] = ()
    result: Any = None


_last = _Last()


def _noted(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, a backend of torch.compile, whose kernels are noted as they are made."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    found = Graph()

    def inner_compile(part: torch.fx.GraphModule, examples: Sequence[Any], **more: Any) -> Any:
        # Read now: Inductor rewrites the graph
        taken = [node.name for node in part.graph.find_nodes(op="placeholder")]
        (outputs,) = part.graph.output_node().args
        made = [getattr(out, "name", "") for out in cast(Sequence[Any], outputs)]
        code: Any = compile_fx_inner(part, examples, **more)
        kernel = getattr(code, "current_callable", None)
        if kernel is None:  # of a graph that computes nothing Inductor makes a plain function
            return code
        if more.get("is_backward"):
            found.backward = kernel
            found.taken = taken
            found.gradients = len(made)
            return code

        def forward(given: list[Any]) -> Sequence[Any]:
            if not _last.looks:
                return kernel(given)
            _last.graph = found
            _last.given = tuple(given)
            out = kernel(given)
            _last.result = out[0]
            return out

        found.forward = kernel
        found.made = made
        code.current_callable = forward
        return code

    # What comes out of that cache was made without `inner_compile`
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(cast(Any, graph), inputs, inner_compile=inner_compile)


# --- the same kernels, called for a block ---


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
        inputs = [
            tokens if each is None else held[each] if isinstance(each, str) else arguments[each]
            for each in self.inputs
        ]
        if self.origins is None:
            assert self.graph.forward is not None
            return self.graph.forward(inputs)[0]
        return applied(_Replayed, self.graph, self.origins, *inputs)


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


class Compiled:
    """A compiled function of one block; see [Note: kernels called again without torch.compile]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # By `_kind_of`
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __call__(self, block: nn.Module, *arguments: Any) -> Tensor:
        if torch.compiler.is_compiling() or _watched():
            return self._through(block, arguments)
        call = self.calls.get(_kind_of(block, arguments))
        if call is not None and call.fits(block, arguments):
            return call.run(arguments)
        return self._first(block, arguments)

    def _through(self, block: nn.Module, arguments: Sequence[Any]) -> Tensor:
        """Through torch.compile, which would make a graph for each kind of view."""
        plain = [unviewed(a) if isinstance(a, Tensor) and a._is_view() else a for a in arguments]
        return self.function(block, *plain)

    def _first(self, block: nn.Module, arguments: Sequence[Any]) -> Tensor:
        """Through torch.compile, looking at what it calls."""
        _last.looks = True
        try:
            out = self._through(block, arguments)
            graph = _last.graph
            given = _last.given
            made_it = graph is not None and _same(_last.result, out)
        finally:
            _last.looks = False
            _last.graph = None
            _last.given = ()
            _last.result = None
        if graph is not None and made_it:
            graph.lengths.add(len(arguments[0]))
            call = _understood(graph, given, block, arguments, out)
            if call is not None:
                self.calls[_kind_of(block, arguments)] = call
        return out


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


def _understood(
    graph: Graph, given: Sequence[Any], block: nn.Module, arguments: Sequence[Any], out: Tensor
) -> Call | None:
    """How the graph's inputs come from a call's; None where it can't be told."""
    tokens = len(arguments[0])
    kinds = _kinds(arguments, tokens)
    inputs = [_origin(each, tokens, block, arguments) for each in given]
    origins = graph.origins() if out.requires_grad else None
    if kinds is None or -1 in inputs or not _distinct(arguments):
        return None
    if out.requires_grad and (origins is None or graph.gradients != len(inputs)):
        return None
    parameters = _kinds_of_parameters(block, inputs)
    return Call(graph, block, tuple(inputs), kinds, parameters, GlobalStateGuard(), origins)


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
