"""The training decoder's forward with paged attention in the middle, then a draw for the rows that
want one.

    embed → projected → [rope, to the cache → attention → after, the next block's projected] × L → head

A block computes `before`, attention and `after` in training. Here it is cut elsewhere, into pieces of
the same methods: a sum and the norm of it are one kernel then, and so are rope and the cache's writes
on a GPU (`fused`).

Legend: t tokens of this rank (all T without a tensor-parallel group) · D model · R rows · r this
rank's · N query heads, n this rank's · J = 2k heads, keys before values, in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retool.engine.experts_cache import ExpertsCache
from retool.engine.kernels.attention import paged_attention
from retool.engine.kernels.draws import Draws
from retool.engine.kernels.kv_cache import KVCache, in_any_order
from retool.engine.kernels.pages import Pages, Seen
from retool.engine.kernels.place import can_place, place
from retool.engine.kernels.sampling import sample
from retool.model.block import Block
from retool.model.compiling.hidden import unviewed
from retool.model.compiling.pieces import compiled_pieces
from retool.model.config import ModelConfig
from retool.model.decoder import Decoder
from retool.model.logits import capped, product, workspace
from retool.model.rope import Frequencies, frequencies, rope_tables
from retool.parallel.collectives import all_to_all, sum_over
from retool.parallel.ulysses import HeadPlan, join_heads, q_k_v


class Pieces(NamedTuple):
    """What of a block is local to a token; compiled where the decoder is."""

    projected: Callable[[Block, Tensor], Tensor]
    rotated: Callable[[Block, Tensor, Tensor, Tensor], Tensor]
    between: Callable[[Block, Block, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Model:
    """What every forward needs, the same from step to step.

    `kernels`: which attention. `fused`: rope and the cache's writes are one kernel. `experts`: where
    the layers' choices are kept. `seen`: what each layer's queries see.
    """

    decoder: Decoder
    cache: KVCache
    plan: HeadPlan
    group: dist.ProcessGroup | None
    kernels: str
    frequencies: Frequencies
    pieces: Pieces
    fused: bool
    experts: ExpertsCache | None
    seen: tuple[Seen, ...]


def seen_by_layer(config: ModelConfig, longest: int) -> tuple[Seen, ...]:
    """What each layer's queries see, in sequences of up to `longest` tokens. A window that reaches across
    such a one is none.
    """
    windows = [config.window(layer) for layer in range(config.layers)]
    return tuple(Seen(n if n < longest else 0, config.score_cap) for n in windows)


def make_model(
    decoder: Decoder,
    cache: KVCache,
    group: dist.ProcessGroup | None,
    kernels: str,
    seen: tuple[Seen, ...],
) -> Model:
    device = cache.data.device
    plan = decoder.execution.plan
    watch = decoder.execution.watch
    pieces = _pieces(decoder)
    # With several ranks heads change places between rope and the cache: no kernel does both
    fused = (
        kernels != "torch"
        and plan.sp == 1
        and decoder.layers[0].rope_is_fusible
        # The kernel turns whole heads
        and decoder.config.turned_channels == plan.head_dim
        and can_place(device, cache.data.dtype, plan.head_dim, decoder.config.qk_norm)
    )
    return Model(
        decoder=decoder,
        cache=cache,
        plan=plan,
        group=group,
        kernels=kernels,
        frequencies=frequencies(decoder.config, device),
        pieces=pieces,
        fused=fused,
        experts=watch if isinstance(watch, ExpertsCache) else None,
        seen=seen,
    )


def _pieces(decoder: Decoder) -> Pieces:
    """Compiled where the decoder is, but for a piece that the compiler can't take as one graph."""
    if not decoder.execution.compiled:
        return PIECES
    fast = Pieces(*map(compiled_pieces, PIECES))
    whole = decoder.layers[0].after_is_compilable
    return fast if whole else fast._replace(between=_between)


def _projected(block: Block, x_tD: Tensor) -> Tensor:
    return block.projected(x_tD)


def _rotated(block: Block, heads_tNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What goes to the head ranks."""
    return block.laid_out(*block.rotated(heads_tNH, cos, sin))


def _between(block: Block, following: Block, x_tD: Tensor, a_tE: Tensor) -> tuple[Tensor, Tensor]:
    """From attention's result to what the next block's rope takes."""
    x_tD = block.after(x_tD, a_tE)
    return x_tD, following.projected(x_tD)


PIECES = Pieces(_projected, _rotated, _between)


def hidden_states(model: Model, tokens_T: Tensor, positions_T: Tensor, pages: Pages) -> Tensor:
    """Run the blocks: this rank's [t, D] before the final norm.

    T must be a multiple of the group's size.
    """
    plan = model.plan
    t = len(tokens_T) // plan.sp
    mine = slice(plan.rank * t, (plan.rank + 1) * t)
    tables = rope_tables(positions_T[mine], model.frequencies, model.decoder.config)
    x_tD = model.decoder.embedded(tokens_T[mine])
    layers = model.decoder.layers
    if model.experts is not None:
        model.experts.slots = pages.slots
    heads = model.pieces.projected(layers[0], x_tD)
    for number, block in enumerate(layers):
        query = _placed(model, number, block, heads, *tables[number], pages)
        out = paged_attention(query, model.cache, number, pages, model.kernels, model.seen[number])
        received = all_to_all(out.flatten(), *plan.to_sequence(t), model.group)
        a_tE = join_heads(received, plan).flatten(1)
        # As far as the next block's projection in one piece: a sum and its norm are one kernel
        if number + 1 < len(layers):
            x_tD, heads = model.pieces.between(block, layers[number + 1], x_tD, unviewed(a_tE))
        else:
            x_tD = block.after_piece(block, x_tD, a_tE)
    return x_tD


def _placed(
    model: Model,
    number: int,
    block: Block,
    heads_tNH: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: Pages,
) -> Tensor:
    """Keys and values go to the cache; this rank's queries of all tokens [T, n, H]."""
    plan = model.plan
    if model.fused:
        weights = block.head_norms()
        norms = None if weights is None else (*weights, model.decoder.config.norm_eps)
        return place(heads_tNH, cos, sin, norms, pages.slots, model.cache.data[number])
    send = model.pieces.rotated(block, heads_tNH, cos, sin)
    received = all_to_all(send, *plan.to_heads(len(heads_tNH)), model.group)
    query, key, value = q_k_v(received, plan)
    model.cache.write(number, pages.slots, _adjacent(received, key, value, plan))
    return query


def _adjacent(received: Tensor, key: Tensor, value: Tensor, plan: HeadPlan) -> Tensor:
    """Keys and values [T, J, H] in one tensor: as they came, unless heads were expanded."""
    if plan.expansion:
        return torch.cat([key, value], 1)
    heads = received.view(-1, plan.widths[plan.rank], plan.head_dim)
    return heads[:, len(plan.query_ranges[plan.rank]) :]


def logits_of(hidden_rD: Tensor, weight_VD: Tensor, cap: float = 0.0) -> Tensor:
    """[r, V] in fp32 (fp64 for fp64), as the trainer's log-probabilities have them."""
    room = workspace(hidden_rD, len(hidden_rD), len(weight_VD))
    return capped(product(hidden_rD, weight_VD, room), cap)


def draw(
    model: Model,
    x_tD: Tensor,
    rows_R: Tensor,
    draws: Draws,
    filtered: bool,
    mine: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Draw for the tokens at `rows`: [3, R] of id, logp, logp_behaviour, the same on every rank.

    With a group, `mine` has the places in `rows` of this rank's tokens and their places in x.
    """
    if mine is None:
        return scored(model, x_tD[rows_R], draws, filtered)
    # Every row's result is one rank's: zeros from the others, so that a sum gathers them
    places, local = mine
    dtype = torch.promote_types(x_tD.dtype, torch.float32)
    out = torch.zeros(3, len(rows_R), dtype=dtype, device=x_tD.device)
    if len(places):
        drawn = scored(model, x_tD[local], Draws(*(d[places] for d in draws)), filtered)
        with in_any_order():
            out[:, places] = drawn
    return sum_over(out, model.group)


def scored(model: Model, x_rD: Tensor, draws: Draws, filtered: bool) -> Tensor:
    """Draw for each of these tokens: [3, r], as `draw` has it."""
    return sample(model.decoder.head(x_rD, logits_of), draws, filtered)
