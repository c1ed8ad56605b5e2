"""Whether transformers' continuous batching can run a borrowed model: tried on the meta device,
before there are weights.

Its paged cache reaches an attention layer among the arguments that each module hands on to the next
one; a module that doesn't, or that asks its cache for more, fails in the first batch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from retool.model.borrowed.attention import let_call
from retool.model.borrowed.config import BorrowedConfig, quiet, why
from retool.model.borrowed.module import blocks_of, causal_model

TOKENS = 4
HANDED_ON = "cu_seq_lens_k"  # one of the arguments that the cache needs


class PagedCache:
    """In the place of the real one and of attention; counts the layers that could use it."""

    def __init__(self, layers_update: bool) -> None:
        self.layers_update = layers_update
        self.served = 0

    def update(
        self,
        key_states: Any,
        value_states: Any,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any]:
        """What a layer of newer versions calls."""
        del layer_idx
        self.served += HANDED_ON in kwargs
        return key_states, value_states

    def attend(
        self,
        layer: torch.nn.Module,
        q_1NtH: torch.Tensor,
        k_1KtH: torch.Tensor,
        v_1KtH: torch.Tensor,
        given: dict[str, Any],
    ) -> torch.Tensor:
        """In older ones attention itself has the cache."""
        del layer, k_1KtH
        if not self.layers_update:
            self.served += given.get("cache") is self
        width = v_1KtH.shape[-1]
        return q_1NtH[..., :width].transpose(1, 2)


def cant_batch(config: BorrowedConfig) -> str:
    """Why transformers' continuous batching can't run this model; "" where it can."""
    from transformers.generation.continuous_batching import cache

    theirs: Any = cache.PagedAttentionCache
    causal = causal_model(config.content)
    blocks = blocks_of(causal)
    arguments = inspect.signature(theirs.update).parameters
    asked = PagedCache(layers_update="kwargs" in arguments)
    for _, block in blocks:
        let_call(block, asked)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), quiet():
            causal(
                input_ids=ids,
                position_ids=ids,
                use_cache=False,
                cache=asked,
                cu_seq_lens_k={},
            )
    except Exception as error:  # its own code, on a cache of another kind than it knows
        return why(error)
    if asked.served != len(blocks):
        return "its attention layers don't get the cache"
    return ""
