"""A borrowed model: transformers' module, with our units, names and vocabulary head around it.

    tokens [t] → transformers' base model → hidden [t, D] → score(hidden, vocabulary matrix)

Legend: t tokens of this rank · D model · V vocab.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from retool.batch import PackedBatch
from retool.model.block import Execution
from retool.model.borrowed.again import run_again_in_backward
from retool.model.borrowed.attention import (
    NAME,
    PackedAttention,
    let_call,
    make_known,
)
from retool.model.borrowed.buffers import fill_buffers
from retool.model.borrowed.config import BorrowedConfig, loaded_config, why
from retool.model.borrowed.names import names_on_disk
from retool.model.decoder import Score

# Columns of a matrix with one more for the bias: products of multiples are fast
ALIGNED = 8
# Of transformers' names, among our module's parameters
PREFIX = "causal."
# What is gathered at once: its name and its modules
Unit = tuple[str, list[nn.Module]]


def causal_model(content: str, attention: str = NAME) -> Any:
    """transformers' module of a config.json's text, on the meta device; `attention` is the name of
    its function, in transformers' table.

    ValueError where transformers can't make it.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
    )

    make_known()
    # It is told its attention: others are made of the same configuration
    config = copy.deepcopy(loaded_config(content))
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            model = kind._from_config(
                config,
                attn_implementation=attention,
                dtype=torch.float32,
            )
    except Exception as error:  # whatever its own code finds wrong with the sizes
        if isinstance(error, KeyError) and error.args == (attention,):
            problem = "its attention layers call no other function than their own"
        else:
            problem = f"transformers can't make a model of it ({why(error)})"
        raise ValueError(problem) from error
    # What draws random numbers is refused, and nothing else depends on the mode
    return model.eval()


def blocks_of(causal: Any) -> list[tuple[str, nn.Module]]:
    """The blocks with their names: what transformers doesn't split, and what has parameters."""
    # What transformers never puts on two devices, which is a decoder layer in every model of its
    # own.
    kinds = set(causal._no_split_modules or ())
    found = []
    for name, module in causal.named_modules():
        has_any = next(module.parameters(), None) is not None
        if type(module).__name__ in kinds and has_any:
            found.append((name, module))
    return found


def around_blocks(causal: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own outside of the blocks; the head's isn't among them."""
    inside = {id(causal.get_output_embeddings())}
    for _, block in blocks_of(causal):
        inside |= set(map(id, block.modules()))
    for name, module in causal.named_modules():
        if id(module) not in inside and own_parameters(module):
            yield name, module


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of the module itself, not of modules in it."""
    own = module._parameters.values()
    return [parameter for parameter in own if parameter is not None]


class Head(nn.Module):
    """The vocabulary matrix and its bias, if it has one, given to `score`."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = scale

    def forward(self, hidden_tD: Tensor, score: Score) -> Any:
        weight = self.linear.weight
        bias = self.linear.bias
        hidden_tD = hidden_tD.to(weight.dtype)
        # The loss takes one matrix: with a column of ones in the hidden state, the bias is a column
        # of it.
        if bias is not None:
            hidden_tD = _with_ones(hidden_tD)
            weight = _with_bias(weight, bias)
        # The scale goes to the hidden state: whole logits are never there to be scaled
        if self.scale != 1.0:
            hidden_tD = hidden_tD * self.scale
        return score(hidden_tD, weight)


def _more(columns: int) -> int:
    """Columns up to a multiple of `ALIGNED`, at least one."""
    return ALIGNED - columns % ALIGNED


def _with_ones(hidden_tD: Tensor) -> Tensor:
    """With a column of ones, which the bias meets, and zeros."""
    tokens, columns = hidden_tD.shape
    ones = hidden_tD.new_zeros(tokens, _more(columns))
    ones[:, 0] = 1.0
    return torch.cat([hidden_tD, ones], 1)


def _with_bias(weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """With the bias as a column, and zeros."""
    entries, columns = weight_VD.shape
    zeros = weight_VD.new_zeros(entries, _more(columns) - 1)
    return torch.cat([weight_VD, bias_V[:, None], zeros], 1)


class BorrowedModel(nn.Module):
    """transformers' module, called as our decoder is.

    Its parameters are on the meta device; `retool.parallel.fsdp.shard` gives them memory.
    """

    def __init__(
        self,
        config: BorrowedConfig,
        execution: Execution,
    ) -> None:
        super().__init__()
        self.config = config
        self.execution = execution
        self.causal = causal_model(config.content)
        table = self.causal.get_output_embeddings()
        self.head = Head(table, config.logits_scale)
        self.blocks = blocks_of(self.causal)
        self.names = names_on_disk(self.causal)
        self.attention = PackedAttention(execution.mesh, execution.backend)
        for _, block in self.blocks:
            let_call(block, self.attention)
            if execution.recompute == "full":
                run_again_in_backward(block, self.attention)

    def forward(self, batch: PackedBatch, score: Score) -> Any:
        """Score this rank's slice of a pack: `score(hidden [t, D], vocabulary matrix [V, D])`."""
        with self.attention.computing(batch):
            out = self.causal.base_model(
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                use_cache=False,
            )
        return self.head(out.last_hidden_state[0], score)

    def fill_buffers(self) -> None:
        """Values of what is no parameter, on the run's device."""
        fill_buffers(self.causal, self.execution.mesh.device)

    def units(self) -> list[Unit]:
        """What is gathered at once, in forward order. A tied embedding and head are one unit."""
        order = list(map(id, self.causal.modules()))
        _, first = self.blocks[0]
        table = self.head.linear.weight
        before: list[Unit] = []
        behind: list[Unit] = []
        head: list[Unit] = [("head", [self.head])]
        for name, module in around_blocks(self.causal):
            unit: Unit = (name, [module])
            # Tied: embedding and head are gathered together, as they are one matrix.
            if any(own is table for own in own_parameters(module)):
                unit[1].append(self.head)
                head.clear()
            is_before = order.index(id(module)) < order.index(id(first))
            (before if is_before else behind).append(unit)
        blocks: list[Unit] = [(name, [block]) for name, block in self.blocks]
        return [*before, *blocks, *behind, *head]

    def order(self) -> tuple[str, ...]:
        """Names in files, in the order of transformers' `parameters()`."""
        each = self.causal.named_parameters()
        return tuple(self.names[name] for name, _ in each)

    def members(self) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Of each parameter its name in files, with its shape."""
        members: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name, parameter in self.causal.named_parameters():
            shape = tuple(parameter.shape)
            members[PREFIX + name] = [(self.names[name], shape)]
        return members

    def fused(self) -> tuple[tuple[str, str], ...]:
        """Nothing: each parameter is a tensor of its own in files."""
        return ()

    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Names in files that are tied to another parameter."""
        first: dict[int, str] = {}
        tied: list[tuple[str, str]] = []
        every = self.causal.named_parameters(remove_duplicate=False)
        for name, parameter in every:
            known = first.setdefault(id(parameter), name)
            if known != name:
                tied.append((self.names[name], self.names[known]))
        return tuple(tied)
