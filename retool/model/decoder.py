"""The decoder: one implementation for training and rollout, on packed tokens.

    tokens [t] → embed → block × L → norm → score(hidden, vocabulary matrix)

A block is three pieces: `before` (norm, q k v, rope) and `after` (o, norm, MLP) are local to a
token and compiled; between them stands attention with its all-to-alls, which isn't.

What the backward finds, per token and layer in elements (Qwen2.5-0.5B: D 896, E = N·H 896, K·H 128,
F 4864):
    none        everything that it needs
    selective   x, q k v, attention's result before and after its all-to-all (D + 3·E + 2·K·H):
                `after` runs again
    full        x and attention's result with its log-sum-exp (D + E): the block runs again, the
                attention kernel doesn't
    offload     the same, of the first blocks in host memory

Legend: T tokens of the pack · t tokens of this sequence-parallel rank · N query heads · K kv heads
· H head dim · D model · F ffn · V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from retool.batch import PackedBatch
from retool.model.attention.dispatch import attention, attention_forward_lse, attention_from_saved
from retool.model.config import ModelConfig
from retool.model.offload import Offload
from retool.model.recompute import recomputed, unviewed
from retool.model.rope import inverse_frequencies, rope_tables, rotate
from retool.parallel.collectives import all_to_all
from retool.parallel.mesh import Mesh
from retool.parallel.ulysses import HeadPlan, join_heads, q_k_v, split_heads

# of a piece in one process: several models, dtypes and layouts. torch's limit of 8 ends the run
GRAPHS = 64
Recompute = Literal["none", "selective", "full", "offload"]
Piece = Callable[..., torch.Tensor]  # of a block, called with it
# (hidden [t, D], vocabulary matrix [V, D]) → tensors
Score = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True)
class Run:
    """How a forward runs: what doesn't change from batch to batch.

    `offload` is there where `recompute` is offload.

    `fp32_residual`: what blocks add to is in at least fp32, not in the weights' dtype; norms hand
    that to the products.
    """

    plan: HeadPlan
    mesh: Mesh
    backend: str = "reference"
    recompute: Recompute = "none"
    compiled: bool = False
    offload: Offload | None = None
    fp32_residual: bool = False


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467), in at
    least fp32; the result in the weight's dtype, which x may exceed.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(
        weight.dtype
    ) * weight


class Block(nn.Module):
    """One decoder layer.

    `qkv` and `gate_up` are the Hugging Face matrices stacked; `members` names them.
    """

    def __init__(self, config: ModelConfig, index: int, run: Run) -> None:
        super().__init__()
        c = config
        self.config = config
        self.index = index
        self.run = run
        wide = (c.heads + 2 * c.kv_heads) * c.head_dim

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.norm_1 = weight(c.hidden)
        self.qkv = weight(wide, c.hidden)
        self.qkv_bias = weight(wide) if c.qkv_bias else None
        self.q_norm = weight(c.head_dim) if c.qk_norm else None
        self.k_norm = weight(c.head_dim) if c.qk_norm else None
        self.o = weight(c.hidden, c.heads * c.head_dim)
        self.o_bias = weight(c.hidden) if c.o_bias else None
        self.norm_2 = weight(c.hidden)
        self.gate_up = weight(2 * c.ffn, c.hidden)
        self.gate_up_bias = weight(2 * c.ffn) if c.mlp_bias else None
        self.down = weight(c.hidden, c.ffn)
        self.down_bias = weight(c.hidden) if c.mlp_bias else None
        self.before_piece, self.after_piece = (
            compiled_pieces() if run.compiled else (Block.before, Block.after)
        )

    def before(self, x_tD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Norm, q k v and rope: [t, D] → the flat buffer that goes to the head ranks, in the
        weights' dtype.
        """
        return self.rotated(self.projected(x_tD), cos, sin)

    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        """Norm, and q k v of all heads: [t, D] → [t, N + 2·K, H]."""
        c = self.config
        heads = F.linear(rms_norm(x_tD, self.norm_1, c.norm_eps), self.qkv, self.qkv_bias)
        return heads.view(-1, c.heads + 2 * c.kv_heads, c.head_dim)

    def rotated(
        self, heads_tNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """q's and k's norms, and rope: `projected` → the flat buffer that goes to the head ranks."""
        c = self.config
        plan = self.run.plan
        q, k, v = heads_tNH.split([c.heads, c.kv_heads, c.kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, c.norm_eps)
            k = rms_norm(k, self.k_norm, c.norm_eps)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        return split_heads(q, k, v.to(q.dtype), plan, self.qkv.dtype)

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        """Output projection, norm and SwiGLU MLP with their residuals: [t, D] and attention's
        result [t, E] → [t, D], in x's dtype.
        """
        x_tD = x_tD + F.linear(a_tE, self.o, self.o_bias)
        gate, up = F.linear(
            rms_norm(x_tD, self.norm_2, self.config.norm_eps), self.gate_up, self.gate_up_bias
        ).chunk(2, -1)
        return x_tD + F.linear(F.silu(gate) * up, self.down, self.down_bias)

    def attend(
        self,
        send: torch.Tensor,
        t: int,
        batch: PackedBatch,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None,
    ) -> torch.Tensor:
        """Sequence → heads, attention over the whole pack, heads → sequence [t, E].

        `kept` remembers the kernel's result.
        """
        plan = self.run.plan
        group = self.run.mesh.sp_group
        q, k, v = q_k_v(all_to_all(send, *plan.to_heads(t), group), plan)
        pack = batch.cu_seqlens, batch.max_seqlen, self.run.backend, batch.seqlens
        if kept is None:
            out = attention(q, k, v, *pack)
        else:
            if not kept:
                kept.append(attention_forward_lse(q, k, v, *pack))
            out = attention_from_saved(q, k, v, *kept[0], *pack)
        return join_heads(all_to_all(out.flatten(), *plan.to_sequence(t), group), plan).flatten(1)

    def forward(
        self, x_tD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: PackedBatch
    ) -> torch.Tensor:
        """[t, D] → [t, D], keeping for the backward what `run.recompute` says."""
        if self.run.recompute in ("full", "offload") and torch.is_grad_enabled():
            return recomputed(self, x_tD, cos, sin, batch, self.run.offload)
        a_tE = self.attend(self.before_piece(self, x_tD, cos, sin), x_tD.shape[0], batch, None)
        if self.run.recompute == "selective":  # nothing in a block draws random numbers
            return _checkpoint(self.after_piece, self, x_tD, a_tE)
        return self.after_piece(self, x_tD, a_tE)

    def members(self) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Hugging Face names and shapes of each parameter's row blocks."""
        c = self.config
        p = f"model.layers.{self.index}."
        rows = [
            ("q", c.heads * c.head_dim),
            ("k", c.kv_heads * c.head_dim),
            ("v", c.kv_heads * c.head_dim),
        ]
        table: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            "norm_1": [(p + "input_layernorm.weight", (c.hidden,))],
            "qkv": [(f"{p}self_attn.{n}_proj.weight", (r, c.hidden)) for n, r in rows],
            "qkv_bias": [(f"{p}self_attn.{n}_proj.bias", (r,)) for n, r in rows],
            "q_norm": [(p + "self_attn.q_norm.weight", (c.head_dim,))],
            "k_norm": [(p + "self_attn.k_norm.weight", (c.head_dim,))],
            "o": [(p + "self_attn.o_proj.weight", (c.hidden, c.heads * c.head_dim))],
            "o_bias": [(p + "self_attn.o_proj.bias", (c.hidden,))],
            "norm_2": [(p + "post_attention_layernorm.weight", (c.hidden,))],
            "gate_up": [(f"{p}mlp.{n}_proj.weight", (c.ffn, c.hidden)) for n in ("gate", "up")],
            "gate_up_bias": [(f"{p}mlp.{n}_proj.bias", (c.ffn,)) for n in ("gate", "up")],
            "down": [(p + "mlp.down_proj.weight", (c.hidden, c.ffn))],
            "down_bias": [(p + "mlp.down_proj.bias", (c.hidden,))],
        }
        return {name: table[name] for name, _ in self.named_parameters()}


def _checkpoint(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Run keeping only the arguments; the backward runs it again."""
    out: Any = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
    return out


def compiled(piece: Callable[..., Any]) -> Callable[..., Any]:
    """A piece through torch.compile: a graph for any length and one for length 1, each with
    gradients and without, for all layers and models of one shape.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    return torch.compile(piece, dynamic=True, fullgraph=True)


def compiled_pieces() -> tuple[Piece, Piece]:
    """`before` and `after`."""
    before = compiled(Block.before)
    after = compiled(Block.after)
    return before, lambda block, x_tD, a_tE: after(block, x_tD, unviewed(a_tE))


class Embedding(nn.Module):
    """Token embedding [V, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab, config.hidden))

    def forward(self, tokens_t: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_t, self.weight)


class Head(nn.Module):
    """Final norm and the vocabulary matrix; `score` turns hidden states into what the caller wants,
    never whole logits.
    """

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm = nn.Parameter(torch.empty(config.hidden))
        self.weight = (
            tied if tied is not None else nn.Parameter(torch.empty(config.vocab, config.hidden))
        )

    def forward(self, x_tD: torch.Tensor, score: Score) -> Any:
        return score(rms_norm(x_tD, self.norm, self.eps), self.weight)


class Decoder(nn.Module):
    """Llama, Qwen2(.5) or Qwen3 dense.

    Build it on the meta device; `retool.parallel.fsdp.shard` gives it memory.
    """

    def __init__(self, config: ModelConfig, run: Run) -> None:
        super().__init__()
        self.config = config
        self.run = run
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, i, run) for i in range(config.layers))
        self.head = Head(config, self.embed.weight if config.tied else None)
        self.inverse: torch.Tensor | None = None

    def forward(self, batch: PackedBatch, score: Score) -> Any:
        """Score this rank's slice of a pack: `score(hidden [t, D], vocabulary matrix [V, D])`."""
        if self.inverse is None:
            self.inverse = inverse_frequencies(self.config, batch.tokens.device)
        cos, sin = rope_tables(batch.positions, self.inverse)
        x_tD = self.embedded(batch.tokens)
        for block in self.blocks:
            x_tD = block(x_tD, cos, sin, batch)
        return self.head(x_tD, score)

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what blocks with weights in `dtype` add to."""
        return torch.promote_types(dtype, torch.float32) if self.run.fp32_residual else dtype

    def embedded(self, tokens_t: torch.Tensor) -> torch.Tensor:
        """[t, D] in the dtype of the residual stream."""
        x_tD = self.embed(tokens_t)
        return x_tD.to(self.residual_dtype(x_tD.dtype))

    def units(self) -> list[tuple[str, list[nn.Module]]]:
        """What is gathered at once, in forward order. A tied embedding and head are one unit."""
        blocks: list[tuple[str, list[nn.Module]]] = [
            (f"layers.{i}", [b]) for i, b in enumerate(self.blocks)
        ]
        if self.config.tied:
            return [("embed", [self.embed, self.head]), *blocks]
        return [("embed", [self.embed]), *blocks, ("head", [self.head])]

    def members(self) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Hugging Face names and shapes behind each of this module's parameters."""
        shape = (self.config.vocab, self.config.hidden)
        table = {
            "embed.weight": [("model.embed_tokens.weight", shape)],
            "head.norm": [("model.norm.weight", (self.config.hidden,))],
        }
        if not self.config.tied:
            table["head.weight"] = [("lm_head.weight", shape)]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            table |= {f"blocks.{i}.{name}": rows for name, rows in block.members().items()}
        return table

    def order(self) -> tuple[str, ...]:
        """Hugging Face names in the order of the transformers module's `parameters()`."""
        c = self.config
        names = ["model.embed_tokens.weight"]
        for i in range(c.layers):
            attention = [
                f"{n}_proj.{w}" for n in "qkv" for w in ("weight", "bias")[: 1 + c.qkv_bias]
            ]
            attention += [f"o_proj.{w}" for w in ("weight", "bias")[: 1 + c.o_bias]] + [
                "q_norm.weight",
                "k_norm.weight",
            ][: 2 * c.qk_norm]
            mlp = [
                f"mlp.{n}_proj.{w}"
                for n in ("gate", "up", "down")
                for w in ("weight", "bias")[: 1 + c.mlp_bias]
            ]
            inside = [
                *(f"self_attn.{n}" for n in attention),
                *mlp,
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
            ]
            names += [f"model.layers.{i}.{n}" for n in inside]
        return (
            (*names, "model.norm.weight")
            if c.tied
            else (*names, "model.norm.weight", "lm_head.weight")
        )

    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Names on disk that are tied to another parameter."""
        return (("lm_head.weight", "model.embed_tokens.weight"),) if self.config.tied else ()
