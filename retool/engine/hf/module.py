"""The module that samples for a borrowed model: transformers', with the trainer's weights.

[Note: weights that are shared] The trainer's module attends to the documents of a pack, and a
sampler to a paged cache: so the sampler has a module of its own, without memory. On one process its
parameters are the trainer's, which hold the whole weights: nothing is copied, and an update is seen
at once. Where several ranks share the weights, each gathers all units before it samples, into
memory that `release` gives back.
"""

from __future__ import annotations

from typing import Any

import torch

from retool.engine.weights import point
from retool.model.borrowed.buffers import fill_buffers
from retool.model.borrowed.module import PREFIX, BorrowedModel, causal_model
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.whole import whole_units

ATTENTION = "sdpa"  # of transformers' functions; it takes a faster one where it finds one


class SamplingModule:
    """`causal` is transformers' module; `gathered` the memory of its weights, where it isn't shared."""

    def __init__(self, sharded: Sharded) -> None:
        """Without weights yet. ValueError for a model that isn't transformers'."""
        model = sharded.module
        if not isinstance(model, BorrowedModel):
            raise ValueError(
                "rollout.name=hf samples from models that run as transformers' module, which this one "
                "doesn't. Use rollout.name=native."
            )
        self.causal: Any = causal_model(model.config.content, ATTENTION)
        fill_buffers(self.causal, sharded.mesh.device)
        self.gathered: list[torch.Tensor] = []
        self._pointed = False

    def take(self, sharded: Sharded) -> None:
        """The trainer's present weights. Collective on all ranks that share them."""
        is_whole = sharded.mesh.shard_group is None
        # One process: its parameters are the trainer's own memory, and need no copy.
        if is_whole and self._pointed:
            return
        if not is_whole and not self.gathered:
            for unit in sharded.layout.units:
                size = unit.numel
                memory = torch.empty(size, dtype=sharded.param_dtype, device=sharded.mesh.device)
                self.gathered.append(memory)
            self._pointed = False
        for number, (layout, flat) in enumerate(whole_units(sharded)):
            whole = flat
            if not is_whole:
                whole = self.gathered[number]
                whole.copy_(flat)
            if self._pointed:
                continue
            for slot in layout.slots:
                view = whole[slot.offset : slot.offset + slot.numel].view(slot.shape)
                point(self.causal, slot.name.removeprefix(PREFIX), view)
        self._pointed = True

    def release(self) -> None:
        """Give the gathered weights back. What is shared stays the trainer's."""
        if not self.gathered:
            return
        self.gathered.clear()
        self._pointed = False
        for name, parameter in list(self.causal.named_parameters()):
            # Views of the old memory would keep it alive.
            point(self.causal, name, torch.empty_like(parameter, device="meta"))
