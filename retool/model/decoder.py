"""The decoder: one implementation for training and rollout, on packed tokens.

    tokens [t] → embedding → block × L → final norm → score(hidden, vocabulary matrix)

What a block does is the family's: `retool.model.families`. What families share is in
`retool.model.block`.

Legend: t tokens of this rank · D model · V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retool.batch import PackedBatch
from retool.model.attention.cudnn import planned_lengths
from retool.model.attention.dispatch import attention
from retool.model.attention.pack import new_pack
from retool.model.block import Block, Execution, new_parameter, rms_norm
from retool.model.catalogue.families import FAMILIES
from retool.model.config import ModelConfig
from retool.model.experts.balance import Balance
from retool.model.hf.names import EMBEDDING, FINAL_NORM, HEAD, LAYER, Stored
from retool.model.rope import Frequencies, document_lengths, frequencies, rope_tables
from retool.parallel.fsdp import Sharded
from retool.parallel.ulysses import HeadPlan, q_k_v

# (hidden [t, D], vocabulary matrix [V, D]) → tensors. Where logits are capped (`ModelConfig`), the
# cap is a third argument: who doesn't take it can't score such a model
Score = Callable[..., Any]


class Embedding(nn.Module):
    """Token embedding [V, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = new_parameter(config.vocab, config.hidden)

    def forward(self, tokens_t: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_t, self.weight)


class Head(nn.Module):
    """Final norm and the vocabulary matrix.

    `score` turns hidden states into what the caller wants, never whole logits.
    """

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.scale = config.logits_scale
        self.cap = config.logits_cap
        self.less_one = config.norms_less_one
        self.norm = new_parameter(config.hidden)
        self.weight = new_parameter(config.vocab, config.hidden) if tied is None else tied

    def forward(self, x_tD: torch.Tensor, score: Score) -> Any:
        # The scale goes to the hidden state: whole logits are never there to be scaled
        normed_tD = rms_norm(x_tD, self.norm, self.eps, self.less_one)
        scaled_tD = normed_tD if self.scale == 1.0 else normed_tD * self.scale
        if self.cap:
            return score(scaled_tD, self.weight, self.cap)
        return score(scaled_tD, self.weight)


class Decoder(nn.Module):
    """A decoder of any family.

    Build it on the meta device; `retool.parallel.fsdp.shard` gives it memory.
    """

    def __init__(self, config: ModelConfig, execution: Execution) -> None:
        super().__init__()
        self.config = config
        self.execution = execution
        family = FAMILIES[config.family]
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(
            family.Block(config, i, execution) for i in range(config.layers)
        )
        self.head = Head(config, self.embed.weight if config.tied else None)
        # Made by the first forward: on the meta device, where this runs, it would have no values
        self.frequencies: Frequencies | None = None

    @property
    def layers(self) -> list[Block]:
        """The blocks, as what they are."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, batch: PackedBatch, score: Score) -> Any:
        """Score this rank's slice of a pack: `score(hidden [t, D], vocabulary matrix [V, D])`."""
        if self.frequencies is None:
            self.frequencies = frequencies(self.config, batch.tokens.device)
        lengths_t = None
        if self.config.steady_length:
            lengths_t = document_lengths(batch, self.execution.mesh.sp_rank)
        tables = rope_tables(batch.positions, self.frequencies, self.config, lengths_t)
        x_tD = self.embedded(batch.tokens)
        for block, (cos, sin) in zip(self.blocks, tables, strict=True):
            x_tD = block(x_tD, cos, sin, batch)
        return self.head(x_tD, score)

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what blocks add to, where their weights are in `dtype`."""
        if self.execution.fp32_residual:
            return torch.promote_types(dtype, torch.float32)
        return dtype

    def embedded(self, tokens_t: torch.Tensor) -> torch.Tensor:
        """[t, D] in the dtype of the residual stream."""
        x_tD = self.embed(tokens_t)
        scale = self.config.embedding_scale
        if self.config.rounded_embedding_scale:
            scale = float(torch.tensor(scale, dtype=x_tD.dtype, device="cpu"))
        x_tD = x_tD.to(self.residual_dtype(x_tD.dtype))
        return x_tD if scale == 1.0 else x_tD * scale

    def units(self) -> list[tuple[str, list[nn.Module]]]:
        """What is gathered at once, in forward order. A tied embedding and head are one unit."""
        blocks: list[tuple[str, list[nn.Module]]] = [
            (f"layers.{i}", [block]) for i, block in enumerate(self.blocks)
        ]
        if self.config.tied:
            return [("embed", [self.embed, self.head]), *blocks]
        return [("embed", [self.embed]), *blocks, ("head", [self.head])]

    def stored(self) -> list[Stored]:
        """Hugging Face's names of all parameters, in the order of transformers' `parameters()`."""
        names = [Stored(EMBEDDING, "embed.weight")]
        for i, block in enumerate(self.layers):
            names += [
                Stored(LAYER.format(i) + name, f"blocks.{i}.{parameter}", rows)
                for name, parameter, rows in block.stored()
                if getattr(block, parameter) is not None
            ]
        names.append(Stored(FINAL_NORM, "head.norm"))
        if not self.config.tied:
            names.append(Stored(HEAD, "head.weight"))
        return names

    def order(self) -> tuple[str, ...]:
        """Hugging Face's names in the order of transformers' `parameters()`."""
        return tuple(stored.name for stored in self.stored())

    def members(self) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Of each parameter the Hugging Face names stacked in it, with their shapes."""
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        members: dict[str, list[tuple[str, tuple[int, ...]]]] = {name: [] for name in shapes}
        for name, parameter, rows in self.stored():
            shape = shapes[parameter]
            # Of experts' matrices, [X, rows, columns], rows lie on top of each other as well
            part = shape if rows is None else (rows, *(shape[1:] if len(shape) < 3 else shape[2:]))
            members[parameter].append((name, part))
        return members

    def fused(self) -> tuple[tuple[str, str], ...]:
        """Names on disk under which all that is stacked in a parameter may stand as one tensor."""
        return tuple(
            (LAYER.format(i) + name, f"blocks.{i}.{parameter}")
            for i, block in enumerate(self.layers)
            for name, parameter in block.fused()
        )

    def divided(self) -> list[str]:
        """Parameters of which each rank of an ep group has another part."""
        return [
            f"blocks.{i}.{parameter}"
            for i, block in enumerate(self.layers)
            for parameter in block.divided()
        ]

    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Names on disk that are tied to another parameter."""
        return ((HEAD, EMBEDDING),) if self.config.tied else ()


def plan_attention(
    sharded: Sharded, lengths: Sequence[int], longest_whole: int | None = None
) -> int:
    """Make cuDNN's plans for one document of each of these lengths, so that no step waits for them on any
    rank.

    `longest_whole`: tokens of the longest document that one rank of several computes; None: any. A
    longer one with all heads could need more memory than the run. Returns for how many lengths; 0
    where another kernel runs. See [Note: cuDNN plans].
    """
    module = sharded.module
    if not isinstance(module, Decoder) or module.execution.backend != "cudnn":
        return 0
    config = module.config
    if all(config.window(layer) for layer in range(config.layers)):
        return 0
    execution = module.execution
    shared = [(execution.plan, lengths)]
    # Where ranks share documents, some packs are divided among them and others aren't
    if execution.plan.sp > 1:
        whole = [n for n in lengths if longest_whole is None or n <= longest_whole]
        shared.append((execution.plan_alone, whole))
    planned = set[int]()
    for heads, found in shared:
        for length in planned_lengths(found, heads.widths[heads.rank] * heads.head_dim):
            _attend_once(length, heads, sharded)
            planned.add(length)
    return len(planned)


def _attend_once(length: int, heads: HeadPlan, sharded: Sharded) -> None:
    """One document through attention and back, laid out as a block has it. Plans are a thread's own:
    the backward's are made in autograd's.
    """
    device = sharded.mesh.device
    numel = length * heads.widths[heads.rank] * heads.head_dim
    sent = torch.zeros(numel, dtype=sharded.param_dtype, device=device, requires_grad=True)
    out = attention(*q_k_v(sent, heads), new_pack((length,), device), "cudnn")
    torch.autograd.grad(out, sent, torch.zeros_like(out))


def balance_of(sharded: Sharded) -> Balance | None:
    """What counts the choices of a model's experts while it is trained; None without experts."""
    module = sharded.module
    watch = module.execution.watch if isinstance(module, Decoder) else None
    return watch if isinstance(watch, Balance) else None
