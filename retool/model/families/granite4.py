"""Granite 4 where every layer is attention and dense: 350M, 1B and Micro without "h".

transformers calls the family `granitemoehybrid`. Layers of Mamba, and experts, are refused by name.

The list of families is in `retool.model.catalogue.families`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from retool.model.config import ModelConfig
from retool.model.families import granite
from retool.model.families.granite import costs as costs
from retool.model.hf.fields import refused, without_agreed
from retool.model.hf.names import Stored, query_key_value

# Of layers of Mamba, and of experts: there are none.
UNUSED = (
    "mamba_n_heads mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand "
    "mamba_chunk_size mamba_conv_bias mamba_proj_bias time_step_limit num_experts_per_tok "
    "router_aux_loss_coef output_router_logits"
).split()
EXPERTS = 8  # transformers' defaults
FFN = 1024
ATTENTION = ("attention", "full_attention")
AGREED = {"normalization_function": "rmsnorm"}


def read_config(c: dict[str, Any]) -> ModelConfig:
    """Granite's fields; the MLP is what the file calls the shared expert."""
    kinds = c.get("layer_types")
    if not isinstance(kinds, list) or any(kind not in ATTENTION for kind in kinds):
        raise ValueError(refused("layer_types", kinds))
    if c.get("num_local_experts", EXPERTS) != 0:
        raise ValueError(refused("num_local_experts", c.get("num_local_experts", EXPERTS)))
    if c.get("mlp_bias"):
        raise ValueError(refused("mlp_bias", c["mlp_bias"]))
    position = c.get("position_embedding_type")
    if position not in ("rope", "nope", None):
        raise ValueError(refused("position_embedding_type", position))
    own = {"shared_intermediate_size", "num_local_experts", "position_embedding_type", *UNUSED}
    rest = {name: value for name, value in without_agreed(c, AGREED).items() if name not in own}
    as_granite = {
        **rest,
        "intermediate_size": c.get("shared_intermediate_size", FFN),
        "layer_types": ["full_attention"] * len(kinds),
    }
    shape = granite.read_config(as_granite)
    return shape if position == "rope" else replace(shape, unrotated=tuple(range(shape.layers)))


class Block(granite.Block):
    """Granite 3's; gate and up are one matrix in the file."""

    def stored(self) -> list[Stored]:
        return [
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
            Stored("shared_mlp.input_linear.weight", "gate_up"),
            Stored("shared_mlp.output_linear.weight", "down"),
            *query_key_value(self.config),
            Stored("self_attn.o_proj.weight", "o"),
            Stored("self_attn.o_proj.bias", "o_bias"),
        ]
