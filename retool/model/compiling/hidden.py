"""What keeps torch.compile, and torch.func, from looking at what is none of their business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """`torch.compiler.disable`, with the signature kept.

    For functions whose arguments on the host, document lengths say, would each be a graph.
    """
    return cast(Function, torch.compiler.disable(function))


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, past what that does for torch.func, which looks at each argument."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*arguments)


def unviewed(x: Tensor) -> Tensor:
    """The same memory, but no view to the compiler: it makes a graph for each kind of view."""
    return torch.ops.aten._unsafe_view(x, x.shape)
