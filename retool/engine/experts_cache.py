"""Which experts computed each token in the KV cache, in pages beside its keys and values.

They are written, shared and copied with a token's keys and values, so whatever the scheduler does
(chunks, shared prompts, preemption, running ahead), a sequence's pages tell who computed it.

Legend: P tokens of a page · L layers · k experts of a token · X experts.
"""

from __future__ import annotations

import numpy as np
import torch

from retool.model.config import ModelConfig


class ExpertsCache:
    """One tensor [pages, P, L, k]; a `routing.Watch` of the engine's decoder.

    int8 where that holds the experts' numbers, else int16.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
    ) -> None:
        sizes = config.experts
        assert sizes is not None
        few = sizes.count - 1 <= torch.iinfo(torch.int8).max
        dtype = torch.int8 if few else torch.int16
        shape = (0, 0, config.layers, sizes.per_token)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.slots: torch.Tensor | None = None

    def allocate(
        self,
        pages: int,
        page_size: int,
    ) -> None:
        """Make room for the KV cache's pages."""
        each = self.data.shape[2:]
        self.data = self.data.new_zeros((pages, page_size, *each))

    def seen(
        self,
        layer: int,
        probs: torch.Tensor,
        experts: torch.Tensor,
        real: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `routing.Watch`. The tokens' places are `slots`, set before each forward."""
        del real
        assert self.slots is not None
        layer_data = self.data.flatten(0, 1)[:, layer]
        # Places are distinct, but for those of page 0 that nobody reads
        layer_data[self.slots] = experts.to(self.data.dtype)
        return probs

    def copy(
        self,
        sources: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Copy pages, as the KV cache does."""
        self.data[targets] = self.data[sources]

    def read(
        self,
        pages: list[int],
        start: int,
        stop: int,
    ) -> np.ndarray:
        """[stop - start, L, k] of the sequence that has these pages. Waits for the device."""
        size = self.data.shape[1]
        first = start // size
        chosen = torch.tensor(pages[first : -(-stop // size)], device=self.data.device)
        tokens = self.data[chosen].flatten(0, 1)
        begin = start - first * size
        return tokens[begin : begin + stop - start].cpu().numpy()


def require_tellable(config: ModelConfig, ranks: int) -> None:
    """ValueError unless an engine of so many ranks can tell which experts computed a token."""
    if config.experts is None:
        raise ValueError(f"a {config.family} model has no experts that could be told.")
    if ranks > 1:
        raise ValueError(
            f"an engine of {ranks} GPUs can't tell which experts computed a token: each has a part "
            "of the tokens. Use tensor_model_parallel_size=1."
        )
