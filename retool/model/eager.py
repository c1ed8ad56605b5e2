"""What torch.compile must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """`torch.compiler.disable` , the signature kept: for functions whose host arguments, document
    lengths say, would each be a graph.
    """
    return cast(Function, torch.compiler.disable(function))
