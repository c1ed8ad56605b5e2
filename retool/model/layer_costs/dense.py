"""What a layer of attention and one gated MLP costs: most families' layer."""

from __future__ import annotations

from collections.abc import Sequence

from retool.model.config import ModelConfig
from retool.model.layer_costs.cost import ChunkedBackward, Cost, LayerCosts, Uncompiled
from retool.parallel.ulysses import HeadPlan


def gated_block_costs(
    config: ModelConfig,
    sp: int,
    more: Sequence[Cost] = (),
    uncompiled: Sequence[Cost] = (),
    norms_after: bool = False,
) -> LayerCosts:
    """A block of attention and a gated MLP with a norm before each, under `sp` sequence ranks; or
    with `norms_after` each.

    `more` is kept besides, where what is before attention isn't recomputed, and `uncompiled` besides
    that where the block isn't compiled.
    """
    c = config
    plan = HeadPlan(sp, 0, c.heads, c.kv_heads, c.head_dim)
    # A kv head travels to every rank that reads it.
    qkv = sum(plan.widths) * c.head_dim
    returned = c.query_width if sp > 1 else 0

    full = (
        Cost("the block's input", c.hidden, "residual"),
        Cost("attention's result", c.query_width),
        Cost("attention's log-sum-exp", c.heads, "fp32"),
    )
    selective = (
        *full,
        *(_first_input(c) if norms_after else _first_norm(c)),
        Cost("q k v where attention runs", qkv),
        Cost("attention's result, back from its all-to-all", returned),
        *more,
    )
    none = (
        *selective,
        *(_normed_results(c) if norms_after else _second_norm(c)),
        # Their product is made again in the backward
        Cost("gate and up", 2 * c.ffn),
    )
    return LayerCosts(
        before=(Cost("q k v", c.hidden * (c.query_width + 2 * c.key_width)),),
        after=(
            Cost("output projection", c.hidden * c.query_width),
            Cost("gate, up and down", 3 * c.hidden * c.ffn),
        ),
        attention_width=c.query_width,
        kept={"none": none, "selective": selective, "full": full, "offload": full},
        gradients=(
            Cost("gradients of gate, up and their product", 3 * c.ffn),
            Cost("gradients of the block's output and input", 2 * c.hidden, "residual"),
        ),
        freed_early=(),
        chunked=_chunked_backward(c, qkv, returned, norms_after),
        uncompiled=Uncompiled(
            before=(
                Cost("the input in the dtype of sums", c.hidden, "widened"),
                Cost("its norm before the weight", c.hidden),
                *uncompiled,
            ),
            after=(
                Cost("the sum in the dtype of sums, in place of that in its own", c.hidden),
                Cost("silu of gate, and its product with up", 2 * c.ffn),
            ),
        ),
    )


def _first_norm(c: ModelConfig) -> tuple[Cost, ...]:
    return (
        Cost("the input's norm", c.hidden),
        Cost("the first norm's scale", 1, "fp32"),
    )


def _second_norm(c: ModelConfig) -> tuple[Cost, ...]:
    return (
        Cost("the sum after attention", c.hidden, "residual"),
        Cost("its norm", c.hidden),
        Cost("the second norm's scale", 1, "fp32"),
    )


def _first_input(c: ModelConfig) -> tuple[Cost, ...]:
    """What q, k and v are made of, where no norm is before them."""
    return (Cost("the input in the weights' dtype", c.hidden, "narrowed"),)


def _normed_results(c: ModelConfig) -> tuple[Cost, ...]:
    """What is kept of the norms after attention and after the MLP."""
    return (
        Cost("the sum after attention, in the weights' dtype", c.hidden),
        Cost("attention's result before its norm, and the MLP's", 2 * c.hidden),
        Cost("both norms' scales", 2, "fp32"),
    )


def wide_heads(c: ModelConfig) -> tuple[Cost, ...]:
    """What norms of queries and keys keep besides, uncompiled."""
    return (
        Cost("queries in the dtype of sums", c.query_width, "sums"),
        Cost("keys likewise, in place of the values", c.key_width),
    )


def _chunked_backward(
    c: ModelConfig, qkv: int, returned: int, norms_after: bool
) -> ChunkedBackward:
    # cuDNN makes the gradients of keys and values for each query head, and adds those of a group
    # up at the end.
    ungrouped = 2 * c.query_width if c.heads > c.kv_heads else 0
    return ChunkedBackward(
        throughout=(
            Cost("gradients of the block's output and input", 2 * c.hidden, "residual"),
            # Without its scale, which is next to nothing
            *(_first_input(c) if norms_after else _first_norm(c)[:1]),
            Cost("q k v where attention runs", qkv),
            Cost("attention's result, back from its all-to-all", returned),
            Cost("the gradient of attention's result", c.query_width),
        ),
        mlp=(
            Cost("the sum after attention, and its gradient", 2 * c.hidden, "residual"),
            Cost("its norm, and the norm's gradient", 2 * c.hidden),
            Cost("gate, up, their gradients and their product", 5 * c.ffn),
        ),
        attention=(
            Cost("the result's gradient before and after its all-to-all", 2 * returned),
            Cost("gradients of q k v", qkv),
            Cost("the kernel's sum of the queries' gradients", c.query_width, "sums"),
            Cost("gradients of keys and values for each query head", ungrouped),
            Cost("two numbers a head of the kernel", 2 * c.heads, "fp32"),
        ),
    )
