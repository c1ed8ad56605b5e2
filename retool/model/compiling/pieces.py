"""Functions of a block through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from retool.model.compiling.calls import Compiled
from retool.model.compiling.graphs import noted

# Several models, dtypes and layouts may share a process; torch's own limit of 8 would end the run.
MAX_GRAPHS_OF_A_FUNCTION = 64


def compiled(function: Callable[..., Any]) -> Compiled:
    """The function through torch.compile: a block's, called with it and with tensors of its tokens.

    It makes a graph for any length and one for length 1, each with gradients and without, for all
    layers and models of one shape.
    """
    _let_in_many()
    fast = torch.compile(function, dynamic=True, fullgraph=True, backend=noted)
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
