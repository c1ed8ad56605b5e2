"""One forward of a borrowed model on the meta device: shapes without numbers.

It finds out what nothing else says: whether every block mixes tokens through our attention and in
no other way, what its attention asks for, and what a block keeps for its backward.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retool.model.borrowed.attention import let_call
from retool.model.borrowed.calls import Calls
from retool.model.borrowed.config import why
from retool.model.borrowed.module import around_blocks, blocks_of
from retool.model.borrowed.watch import Kept, Watch

# What a block keeps that doesn't grow with the tokens weighs little among so many
TOKENS = 64
# What mixes tokens beside attention, by words in the names of transformers' classes
OTHER_MIXERS = (
    "Mamba",
    "SSM",
    "Recurrent",
    "Rwkv",
    "LinearAttention",
    "DeltaNet",
    "ShortConv",
)


@dataclass(frozen=True)
class Trial:
    """What a trial found."""

    calls: Calls
    kept: Kept
    blocks: int


def try_on_shapes(causal: Any) -> Trial:
    """Run the base model on the meta device.

    ValueError says what can't work here.
    """
    blocks = blocks_of(causal)
    if not blocks:
        raise ValueError("transformers doesn't say what its blocks are")
    _require_positions(causal.base_model)
    calls = Calls()
    for name, block in blocks:
        _require_no_other_mixer(name, block)
        let_call(block, calls)
    watch = _run(causal, calls)
    if len(watch.attended) != len(blocks):
        count = len(watch.attended)
        raise ValueError(f"it runs {count} blocks where it has {len(blocks)}")
    for (name, block), count in zip(blocks, watch.attended, strict=True):
        # Units are gathered block by block: a block that attends twice, or never, isn't what we
        # take it for.
        if count != 1:
            kind = type(block).__name__
            times = f"{count} times" if count else "never"
            raise ValueError(f"{name} ({kind}) calls attention {times}, not once")
    for name, module in around_blocks(causal):
        # Weights are gathered when a module is called: used behind its back, they would be empty.
        if id(module) not in watch.called:
            raise ValueError(f"the weights of {name} are used without calling it")
    return Trial(calls, watch.kept(TOKENS), len(blocks))


def _run(causal: Any, calls: Calls) -> Watch:
    """The forward, watched; in bf16, so that what is computed in fp32 nevertheless shows."""
    causal.to(torch.bfloat16)
    ids = torch.zeros(
        1,
        TOKENS,
        dtype=torch.int64,
        device="meta",
    )
    watch = Watch(calls)
    with watch.watching(causal):
        try:
            causal.base_model(
                input_ids=ids,
                position_ids=ids,
                use_cache=False,
            )
        except Exception as error:  # what a model does with its own sizes has no one kind
            problem = f"its forward fails ({why(error)})"
            if calls.faults:
                problem = calls.faults[0]
            raise ValueError(problem) from error
    return watch


def _require_positions(base: nn.Module) -> None:
    parameters = inspect.signature(base.forward).parameters
    if "position_ids" not in parameters:
        problem = "it takes no position_ids"
        raise ValueError(f"{problem}: documents of a pack couldn't begin at 0")


def _require_no_other_mixer(name: str, block: nn.Module) -> None:
    """ValueError for what would carry one document's state into the next."""
    for place, inside in block.named_modules():
        kind = type(inside).__name__
        mixes = any(word in kind for word in OTHER_MIXERS)
        if isinstance(inside, nn.Conv1d):
            mixes = mixes or inside.kernel_size[0] > 1
        if mixes or isinstance(inside, nn.RNNBase):
            problem = f"{name}.{place} ({kind}) mixes tokens beside attention"
            raise ValueError(f"{problem}: one document's state would reach the next")
