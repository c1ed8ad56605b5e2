"""What torch.compile takes, and what it must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# Several models, dtypes and layouts may share a process; torch's own limit of 8 would end the run.
MAX_GRAPHS_OF_A_FUNCTION = 64


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile.

    It makes a graph for any length and one for length 1, each with gradients and without, for all
    layers and models of one shape.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS_OF_A_FUNCTION)
    return torch.compile(function, dynamic=True, fullgraph=True)


def eager(function: Function) -> Function:
    """`torch.compiler.disable`, with the signature kept.

    For functions whose arguments on the host, document lengths say, would each be a graph.
    """
    return cast(Function, torch.compiler.disable(function))


def unviewed(x: torch.Tensor) -> torch.Tensor:
    """The same memory, but no view to the compiler: it makes a graph for each kind of view."""
    return torch.ops.aten._unsafe_view(x, x.shape)
