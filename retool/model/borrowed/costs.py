"""What a block of a borrowed model costs: counted, and measured on the meta device.

Not measured are peaks of a GPU. What a backward has beside what was kept is taken to be as much
again: more than most blocks need.
"""

from __future__ import annotations

from retool.model.borrowed.config import BorrowedConfig
from retool.model.borrowed.read import measured
from retool.model.layer_costs.cost import ChunkedBackward, Cost, LayerCosts


def costs(config: BorrowedConfig) -> LayerCosts:
    """What the largest block costs. A block runs again as a whole, or not at all."""
    found = measured(config.content)
    kept = found.kept
    none = (
        Cost("what it keeps in the weights' dtype", kept.compute),
        Cost("what it keeps in fp32", kept.fp32, "fp32"),
    )
    full = Cost("the block's input", config.hidden, "residual")
    matrices = Cost("all matrices of a block", found.matrices)
    # Long packs run as short ones do
    chunked = ChunkedBackward(
        throughout=(*none, *none),
        mlp=(),
        attention=(),
    )
    return LayerCosts(
        before=(),
        after=(matrices,),
        attention_width=config.query_width,
        kept={"none": none, "full": (full,)},
        gradients=none,
        freed_early=(),
        chunked=chunked,
    )
