"""What a layer with experts costs: a dense layer's costs, and the differences.

A token runs through an MLP as wide as its k experts together, while the matrices of all of them are
there; and it lies in memory k times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retool.model.config import ModelConfig
from retool.model.layer_costs.cost import Cost, LayerCosts, Uncompiled
from retool.model.layer_costs.dense import gated_block_costs


def expert_costs(
    config: ModelConfig, sp: int, more: Sequence[Cost] = (), uncompiled: Sequence[Cost] = ()
) -> LayerCosts:
    """A block of attention and experts with a norm before each; `more` and `uncompiled` as in
    `gated_block_costs`.
    """
    sizes = config.experts
    assert sizes is not None
    per_token = sizes.per_token
    as_wide = replace(config, ffn=per_token * sizes.width)
    dense = gated_block_costs(as_wide, sp, more, uncompiled)
    expert = 3 * config.hidden * sizes.width
    matrices = (
        dense.before[0],
        Cost("output projection", config.hidden * config.query_width),
        Cost("router", sizes.count * config.hidden),
        Cost("gate, up and down of all experts", sizes.count * expert),
    )
    # Nothing here is fused: silu of gate, and the product before its weight, are tensors of their own
    product = Cost("the product of gate and up", per_token * sizes.width)
    added = (
        Cost("the norm, for each expert", per_token * config.hidden),
        Cost("silu of gate, and the product before its weight", 2 * per_token * sizes.width),
        Cost("probabilities of all experts, and their scores", 2 * sizes.count, "fp32"),
        Cost("the norm for the router", config.hidden, "sums"),
        Cost("which expert, and where, three times", 6 * per_token, "fp32"),
    )
    gradients = (
        *dense.gradients,
        Cost("gradients for each expert, before they are added up", 2 * per_token * config.hidden),
        Cost("gradients of silu and products", 2 * per_token * sizes.width),
    )
    mlp = (
        *dense.chunked.mlp,
        *added,
        *gradients[len(dense.gradients) :],
    )
    return replace(
        dense,
        before=matrices[:1],
        after=matrices[1:],
        unused=(sizes.count - per_token) * expert,
        divided=sizes.count * expert,
        travelling=(
            Cost("rows as they leave and as they arrive", 2 * per_token * config.hidden),
            Cost("which expert, where, and the weight of a row", 7 * per_token, "fp32"),
        ),
        kept={**dense.kept, "none": (*dense.kept["none"], product, *added)},
        gradients=gradients,
        freed_early=(product,),
        chunked=replace(dense.chunked, mlp=mlp),
        # The rest isn't compiled in any case
        uncompiled=Uncompiled(dense.uncompiled.before),
    )
