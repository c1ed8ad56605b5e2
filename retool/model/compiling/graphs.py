"""The kernels that torch.compile makes of a function, noted on the way.

It makes them through a backend, `noted`: Inductor as it is, whose kernels are written down. They
are private parts of torch. Where one isn't as it was in torch 2.11 to 2.14, nothing is noted, a
warning says so, and blocks go through torch.compile alone.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pkgutil import resolve_name
from typing import Any, NamedTuple, cast

import torch

Kernels = Callable[
    [list[Any]], Sequence[Any]
]  # Inductor's; they empty the list that they are given

# Used in this folder, beside what `unknown_part` looks at itself
PRIVATE_PARTS = (
    "torch._C:_len_torch_dispatch_stack",
    "torch._C._autograd:_get_current_graph_task_keep_graph",
    "torch._C._autograd:_top_saved_tensors_default_hooks",
    "torch._C._dynamo.guards:GlobalStateGuard.check",
    "torch._functorch.config:enable_autograd_cache",
    "torch._inductor.compile_fx:compile_fx_inner",
)


@lru_cache(maxsize=1)
def unknown_part() -> str:
    """The private part of torch that isn't there, or isn't as it is used here; empty where all are."""
    for name in PRIVATE_PARTS:
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            return name.replace(":", ".")
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.output_code import CompiledFxGraph

    if "inner_compile" not in inspect.signature(compile_fx).parameters:
        return "torch._inductor.compile_fx.compile_fx(inner_compile=…)"
    if "current_callable" not in inspect.get_annotations(CompiledFxGraph):
        return "torch._inductor.output_code.CompiledFxGraph.current_callable"
    return ""


@dataclass(eq=False)
class Graph:
    """A graph's kernels, and the names of what goes from one to the other.

    `forward` returns the result and what its backward needs, by the names in `made`; `backward`
    takes what has the names in `taken`, the result's gradient among them, and returns a gradient
    for each input of `forward`.
    """

    forward: Kernels | None = None
    made: list[str] = field(default_factory=list)
    backward: Kernels | None = None
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


class Run(NamedTuple):
    """A forward of a graph, called by torch.compile: what it was given, and what it made first."""

    graph: Graph
    given: tuple[Any, ...]
    result: Any


class _Watch(threading.local):
    """The runs of this thread while it looks; None while it doesn't."""

    runs: list[Run] | None = None


_watch = _Watch()


@contextmanager
def looking() -> Iterator[list[Run]]:
    """What graphs this thread runs meanwhile."""
    runs = list[Run]()
    _watch.runs = runs
    try:
        yield runs
    finally:
        _watch.runs = None


def noted(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, a backend of torch.compile, whose kernels are noted as they are made."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    if part := unknown_part():
        warnings.warn(
            f"torch {torch.__version__} has no {part}: blocks are called through torch.compile, which "
            "takes the host longer. torch 2.11 to 2.14 have it.",
            stacklevel=2,
        )
        return compile_fx(cast(Any, graph), inputs)
    found = Graph()

    def inner_compile(part: torch.fx.GraphModule, examples: Sequence[Any], **more: Any) -> Any:
        # Read now: Inductor rewrites the graph
        taken = [node.name for node in part.graph.find_nodes(op="placeholder")]
        (outputs,) = part.graph.output_node().args
        made = [getattr(out, "name", "") for out in cast(Sequence[Any], outputs)]
        code: Any = compile_fx_inner(part, examples, **more)
        kernels = getattr(code, "current_callable", None)
        if kernels is None:  # of a graph that computes nothing Inductor makes a plain function
            return code
        if more.get("is_backward"):
            found.backward = kernels
            found.taken = taken
            found.gradients = len(made)
            return code

        def forward(given: list[Any]) -> Sequence[Any]:
            if _watch.runs is None:
                return kernels(given)
            # Before they run: they empty the list
            kept = tuple(given)
            out = kernels(given)
            _watch.runs.append(Run(found, kept, out[0]))
            return out

        found.forward = kernels
        found.made = made
        code.current_callable = forward
        return code

    # What comes out of that cache was made without `inner_compile`
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(cast(Any, graph), inputs, inner_compile=inner_compile)
