"""One decoder layer: what the blocks of all families have in common.

    x [t, D] → before → attend → after → [t, D]

`before` (norm, q k v, rope) and `after` (output projection, norm, MLP) are the family's. They are
local to a token, and compiled. `attend` between them does Ulysses' two all-to-alls around the
attention kernel, and isn't compiled.

What a backward finds, per token and layer (E = N·H):

    none         everything that it needs
    selective    x, q k v, attention's result before and after its all-to-all: `after` runs again
    full         x, attention's result and its log-sum-exp: the block runs again, its kernel doesn't
    offload      as full, but the first blocks' are in host memory

Legend: t tokens of this rank · N query heads · K kv heads · J = N + 2·K heads · H head dim · D model
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from retool.batch import PackedBatch
from retool.model.attention.dispatch import attention, attention_forward_lse
from retool.model.attention.joined import joined_attention
from retool.model.attention.pack import Attended, pack_of
from retool.model.compiling.hidden import unviewed
from retool.model.compiling.pieces import compiled
from retool.model.config import ModelConfig
from retool.model.experts.routing import Watch
from retool.model.fused.gated import gated_down
from retool.model.fused.heads import turned
from retool.model.hf.names import Stored
from retool.model.offload import Offload
from retool.model.recompute import Recompute, recomputed
from retool.parallel.collectives import all_to_all
from retool.parallel.mesh import Mesh
from retool.parallel.ulysses import HeadPlan, join_heads, q_k_v, split_heads

Part = Callable[..., torch.Tensor]  # of a block, called with it
# What `after` takes of each token besides; None: not there
PerToken = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Execution:
    """How a forward runs: what doesn't change from batch to batch.

    `offload` is there where `recompute` is offload. `fp32_residual`: what blocks add to is in at
    least fp32, not in the weights' dtype; norms hand on the weights' dtype to the products. `watch`
    looks at what experts every layer chooses.
    """

    plan: HeadPlan
    mesh: Mesh
    backend: str = "reference"
    recompute: Recompute = "none"
    compiled: bool = False
    offload: Offload | None = None
    fp32_residual: bool = False
    watch: Watch | None = None
    # For a pack whose documents lie on one rank each: all heads on this one
    plan_alone: HeadPlan = field(init=False)

    def __post_init__(self) -> None:
        alone = HeadPlan(1, 0, self.plan.heads, self.plan.kv_heads, self.plan.head_dim)
        object.__setattr__(self, "plan_alone", alone)

    def heads_of(self, batch: PackedBatch) -> tuple[HeadPlan, dist.ProcessGroup | None]:
        """Which heads this rank computes, and who has the others: nobody, where `batch` is alone."""
        return (self.plan_alone, None) if batch.alone else (self.plan, self.mesh.sp_group)


class Block(nn.Module, ABC):
    """A decoder layer; a family gives its parameters, `projected`, `rotated`, `after`, `stored`."""

    # Whether `rotated` is `head_norms` and rope alone, so that the engine's kernel may do it instead
    rope_is_fusible: ClassVar[bool] = False
    # Whether `after` is this rank's alone, so that it may run in chunks: not where ranks divide experts
    after_is_local = True
    # Whether `after` is products and elementwise work alone, which the compiler takes as one graph
    after_is_compilable: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.window = config.window(index)  # tokens that a query sees; 0: all
        self.execution = execution
        # Not while a backward runs `after` again: its numbers are read by nobody then, and what an
        # MLP adds at its end may stay uncomputed
        self.result_wanted = True
        # Functions of the class, called with the block: one compiled graph serves all layers
        before = type(self).sent
        after = type(self).after
        # Attention stays outside: its kernels aren't the compiler's, and all-to-alls would break
        # the graph.
        self.before_piece: Part = compiled(before) if execution.compiled else before
        fast = execution.compiled and self.after_is_compilable
        self.after_piece: Part = compiled(after) if fast else after

    @abstractmethod
    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        """Norm, and q k v of all heads: [t, D] → [t, J, H]."""

    @abstractmethod
    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`projected` → q [t, N, H] and k [t, K, H] after rope, in at least fp32; v as it was."""

    @abstractmethod
    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        """The block's input and attention's result → [t, D] in x's dtype, residuals added.

        What `per_token` gives comes as further arguments, in training.
        """

    @abstractmethod
    def stored(self) -> list[Stored]:
        """Hugging Face's names of this layer's parameters, in the order of transformers' module.

        They come without the layer's prefix. A name whose parameter is None isn't there.
        """

    def fused(self) -> list[tuple[str, str]]:
        """(Hugging Face's name, parameter): names under which what `stored` gives one by one may stand
        in one tensor. Read, never written.
        """
        return []

    def divided(self) -> list[str]:
        """Parameters of which each rank of an ep group has another part, stacked in the order of their
        names in `stored`.
        """
        return []

    def per_token(self, batch: PackedBatch) -> PerToken:
        """What `after` needs of each token of this rank besides, [t, …] each."""
        del batch
        return ()

    def head_norms(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights [H] of the norms that q's and k's heads have before rope; None without."""
        return None

    def sent(
        self, x_tD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, alone: bool = False
    ) -> torch.Tensor:
        """`projected` and `rotated`, as the flat buffer that goes to the head ranks, in the weights'
        dtype.

        `alone`: all of it stays here.
        """
        heads_tJH = self.projected(x_tD)
        c = self.config
        # One rank has all heads, in the order in which they are
        if self.rope_is_fusible and self.head_norms() is None and self.plan_of(alone).sp == 1:
            sent_tJH = turned(heads_tJH, cos, sin, c.heads + c.kv_heads)
            if sent_tJH is not None:
                return unviewed(sent_tJH.flatten())
        return self.laid_out(*self.rotated(heads_tJH, cos, sin), alone)

    def plan_of(self, alone: bool) -> HeadPlan:
        return self.execution.plan_alone if alone else self.execution.plan

    def laid_out(
        self, q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor, alone: bool = False
    ) -> torch.Tensor:
        """q, k and v in one flat buffer, rank after rank, rounded once to the weights' dtype."""
        plan = self.plan_of(alone)
        # v follows q and k into the dtype of rope's result: they travel as one buffer
        sent = split_heads(q_tNH, k_tKH, v_tKH.to(q_tNH.dtype), plan, v_tKH.dtype)
        return unviewed(sent) if torch.compiler.is_compiling() else sent

    def by_head(self, qkv: torch.Tensor) -> torch.Tensor:
        """[t, J·H] → [t, J, H]."""
        c = self.config
        return qkv.view(-1, c.heads + 2 * c.kv_heads, c.head_dim)

    def q_k_v(self, heads_tJH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[t, J, H] → q [t, N, H], k and v [t, K, H]."""
        c = self.config
        q, k, v = heads_tJH.split([c.heads, c.kv_heads, c.kv_heads], 1)
        return q, k, v

    def attend(
        self, sent: torch.Tensor, t: int, batch: PackedBatch, saved: Attended | None = None
    ) -> torch.Tensor:
        """Sequence → heads, attention over the whole pack, heads → sequence [t, E].

        `saved` is what `attend_and_save` gave for the same q, k and v: the kernel doesn't run.
        """
        received, plan = self._gathered(sent, t, batch)
        pack = pack_of(batch, self.window, self.config.score_cap)
        backend = self.execution.backend
        # A copy of a kv head for each query head isn't part of the buffer
        if plan.expansion is None:
            heads = plan.by_head(received)
            out = joined_attention(heads, plan.local_kv_heads, pack, backend, saved)
        else:
            out = attention(*q_k_v(received, plan), pack, backend, saved)
        return self._returned(out, t, batch)

    def attend_and_save(
        self, sent: torch.Tensor, t: int, batch: PackedBatch
    ) -> tuple[torch.Tensor, Attended]:
        """`attend` without a graph, and the kernel's own result with its log-sum-exp."""
        received, plan = self._gathered(sent, t, batch)
        pack = pack_of(batch, self.window, self.config.score_cap)
        backend = self.execution.backend
        out, lse = attention_forward_lse(*q_k_v(received, plan), pack, backend)
        return self._returned(out, t, batch), (out, lse)

    def _gathered(
        self, sent: torch.Tensor, t: int, batch: PackedBatch
    ) -> tuple[torch.Tensor, HeadPlan]:
        """All tokens of this rank's heads, flat, and which heads these are."""
        plan, group = self.execution.heads_of(batch)
        return all_to_all(sent, *plan.to_heads(t), group), plan

    def _returned(self, out_TnH: torch.Tensor, t: int, batch: PackedBatch) -> torch.Tensor:
        """All heads of this rank's tokens, [t, E]."""
        plan, group = self.execution.heads_of(batch)
        received = all_to_all(out_TnH.flatten(), *plan.to_sequence(t), group)
        return join_heads(received, plan).flatten(1)

    def forward(
        self, x_tD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: PackedBatch
    ) -> torch.Tensor:
        """[t, D] → [t, D], keeping for the backward what `execution.recompute` says."""
        how = self.execution.recompute
        # Without gradients nothing is kept, so nothing is computed again
        if how in ("full", "offload") and torch.is_grad_enabled():
            return recomputed(self, x_tD, cos, sin, batch, self.execution.offload)
        a_tE = self.attend(self.before_piece(self, x_tD, cos, sin, batch.alone), len(x_tD), batch)
        beside = self.per_token(batch)
        if how == "selective":
            return _run_again_in_backward(self.after_piece, self, x_tD, a_tE, *beside)
        return self.after_piece(self, x_tD, a_tE, *beside)


def new_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, less_one: bool = False
) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Computed in at least fp32; the result is in the weight's dtype, which x may exceed. `less_one`:
    the weight is stored less 1, as Gemma has it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(-1, keepdim=True)
    if less_one:
        # Gemma rounds once, at the end
        scaled = wide * torch.rsqrt(mean_square + eps) * (1.0 + weight.to(wide.dtype))
        return scaled.to(weight.dtype)
    # Rounded before it meets the weight, as transformers does it
    return (wide * torch.rsqrt(mean_square + eps)).to(weight.dtype) * weight


def swiglu(
    x_tD: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    wanted: bool = True,
) -> torch.Tensor:
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202); `gate_up` [2·F, D] is both stacked.

    `wanted` as in `gated_down`: a block whose result is a plain sum with this one gives its own
    `result_wanted`.
    """
    gate_up_tG = F.linear(x_tD, gate_up, gate_up_bias)
    return gated_down(gate_up_tG, down, down_bias, "silu", wanted=wanted)


def _run_again_in_backward(function: Part, *args: Any) -> torch.Tensor:
    """Run keeping only the arguments; nothing in a block draws random numbers."""
    out: Any = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
    return out
