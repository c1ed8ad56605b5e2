"""Rope on its way to attention: q's and k's heads turned, v's as they are, in one buffer.

    q k v of all heads [t, J, H] → the same, turned → attention

Compiled on a GPU it is an operator of ours (`fused/heads_operators.py`). The compiler's own kernel asks of
every number which of six tensors it comes from, at a quarter of the memory's speed.

Legend: t tokens of this rank · J = N + 2·K heads, q's before k's before v's · H head dim · C = H / 2.
"""

from __future__ import annotations

from torch import Tensor

from retool.model.fused.where import HAS_TRITON, is_fused

# The compiler must know an operator before it meets it
if HAS_TRITON:
    from retool.model.fused.heads_operators import turned_heads
else:
    turned_heads = None


def turned(
    heads_tJH: Tensor,
    cos_tC: Tensor,
    sin_tC: Tensor,
    count: int,
) -> Tensor | None:
    """The first `count` heads after rope, the others as they are: [t, J, H] in the heads' dtype,
    rounded once. None where there is no kernel: where rope doesn't turn whole heads, too.
    """
    whole = 2 * cos_tC.shape[-1] == heads_tJH.shape[-1]
    if turned_heads is None or not whole or not is_fused(heads_tJH):
        return None
    return turned_heads(heads_tJH, cos_tC, sin_tC, count, False)
