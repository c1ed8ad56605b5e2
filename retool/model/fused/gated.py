"""What a gated MLP does between its first product and its result: down(act(gate) · up).

    gate and up [t, 2·F] → their product [t, F] → down → [t, D]

Compiled on a GPU it is an operator of ours (`fused/gated_operators.py`): its backward reads every tensor once,
and makes the product again instead of finding it kept. Elsewhere it is torch's own operations.

Legend: t tokens of this rank · F ffn · D model.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from retool.model.fused.where import HAS_TRITON, is_fused

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

# The compiler must know an operator before it meets it
if HAS_TRITON:
    from retool.model.fused.gated_operators import fused_gated_down
else:
    fused_gated_down = None


def gated_down(
    gate_up_tG: Tensor,
    down: Tensor,
    bias: Tensor | None,
    activation: Activation,
    *,
    wanted: bool = True,
) -> Tensor:
    """down(act(gate) · up) + bias: [t, 2·F] → [t, D].

    `gate_up_tG` has gate's F columns before up's. SwiGLU with silu, GeGLU with gelu (Shazeer, arXiv
    2002.05202), here in its tanh form. Unless the result is `wanted`, it may be any numbers: its
    gradients are right.
    """
    if fused_gated_down is not None and is_fused(gate_up_tG):
        return fused_gated_down(gate_up_tG, down, bias, activation == "gelu_tanh", wanted)
    gate, up = gate_up_tG.chunk(2, -1)
    gated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return F.linear(gated * up, down, bias)
