"""Where the operators of this folder stand in for torch's own operations."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def is_fused(x: Tensor) -> bool:
    """Whether this is code for a GPU that is being compiled.

    Uncompiled, an operator's way through Python would cost more than it saves.
    """
    return torch.compiler.is_compiling() and x.is_cuda and x.dtype != torch.float64
