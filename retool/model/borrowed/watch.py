"""Watching a borrowed model's forward without numbers: what is called, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from retool.model.borrowed.calls import Calls
from retool.model.borrowed.module import around_blocks, blocks_of

FP32_BYTES = 4


@dataclass(frozen=True)
class Kept:
    """Elements that a block keeps for its backward, per token: in the weights' dtype, in fp32."""

    compute: int
    fp32: int


class Watch:
    """A forward's calls of attention by block, the modules around blocks that it called, and the
    tensors that each block kept.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.attended: list[int] = []
        self.called: set[int] = set()
        # Of each block, by memory: views of one tensor are one
        self.tensors: list[dict[int, Tensor]] = []
        self.weights: set[int] = set()
        self.inside: list[saved_tensors_hooks] = []

    @contextmanager
    def watching(self, causal: Any) -> Iterator[None]:
        """Watch what the model does inside."""
        self.weights = set(map(memory, causal.parameters()))
        handles: list[RemovableHandle] = []
        for _, block in blocks_of(causal):
            enter = block.register_forward_pre_hook(self._enter)
            leave = block.register_forward_hook(self._leave)
            handles += [enter, leave]
        for _, module in around_blocks(causal):
            handles.append(module.register_forward_pre_hook(self._call))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            # A forward that failed never left its block
            for hooks in self.inside:
                hooks.__exit__(None, None, None)

    def _enter(self, *_: Any) -> None:
        kept: dict[int, Tensor] = {}
        self.tensors.append(kept)
        self.attended.append(-len(self.calls.heads))
        hooks = saved_tensors_hooks(partial(self._keep, kept), _same)
        hooks.__enter__()
        self.inside.append(hooks)

    def _leave(self, *_: Any) -> None:
        self.inside.pop().__exit__(None, None, None)
        self.attended[-1] += len(self.calls.heads)

    def _call(self, module: nn.Module, *_: Any) -> None:
        self.called.add(id(module))

    def _keep(self, kept: dict[int, Tensor], tensor: Tensor) -> Tensor:
        place = memory(tensor)
        if place not in self.weights:
            # Held on to: another tensor would take its place
            kept.setdefault(place, tensor)
        return tensor

    def kept(self, tokens: int) -> Kept:
        """Of the block that keeps most, in a forward of so many tokens in bf16."""
        most = Kept(0, 0)
        for kept in self.tensors:
            compute = 0
            other_bytes = 0
            for tensor in kept.values():
                if tensor.dtype == torch.bfloat16:
                    compute += tensor.numel()
                else:
                    other_bytes += tensor.nbytes
            fp32 = math.ceil(other_bytes / FP32_BYTES / tokens)
            found = Kept(math.ceil(compute / tokens), fp32)
            most = max(most, found, key=_size)
        return most


def _size(kept: Kept) -> int:
    return kept.compute * torch.bfloat16.itemsize + kept.fp32 * FP32_BYTES


def _same(tensor: Tensor) -> Tensor:
    return tensor


def memory(tensor: Tensor) -> int:
    """What memory a tensor is in; on the meta device there is none, but still a number for it."""
    return tensor.untyped_storage()._cdata
