"""Blocks that keep only their input and run again in the backward, attention's kernel included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from retool.model.borrowed.attention import PackedAttention


def run_again_in_backward(block: nn.Module, attention: PackedAttention) -> None:
    """Give the block a forward that keeps its arguments only.

    It is inside of the module's call: whatever hangs on that (sharding's hooks) runs once.
    """
    forward = block.forward

    def keeping_arguments(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        pack = attention.pack

        def of_that_pack(*args: Any, **kwargs: Any) -> Any:
            # By the backward another pack may have been computed
            with attention.computing(pack):
                return forward(*args, **kwargs)

        # Nothing draws random numbers: models with dropout are refused
        return checkpoint(
            of_that_pack,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
            **kwargs,
        )

    block.forward = keeping_arguments
