"""Phi-3 and Phi-4: Llama's layer under other names. The small ones have LongRoPE, and Phi-4-mini turns
three quarters of each head.

The list of families is in `retool.model.catalogue.families`.
"""

from __future__ import annotations

from typing import Any

from retool.model.config import LongScaling, ModelConfig
from retool.model.families import llama
from retool.model.families.llama import costs as costs
from retool.model.hf.fields import WINDOWS, refused, size, without_agreed
from retool.model.hf.names import Stored
from retool.model.hf.rope_fields import ORIGINAL_LENGTH, rotary_dim, without_share
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import in_every_layer

FIELDS = WINDOWS  # beside those that every family has
# transformers' defaults
NORM_EPS = 1e-5
LENGTH = 4096
# What files call LongRoPE, in transformers too: "yarn" isn't YaRN here
LONGROPE = ("longrope", "su", "yarn")
# Where their maker's own code is, from before transformers had it
MAKERS_CODE = "modeling_phi3.Phi3ForCausalLM"
AGREED = {"full_attn_mod": 1, "interpolate_factor": 1}


def read_config(c: dict[str, Any]) -> ModelConfig:
    """The original length is a field of its own, wherever else a file says it."""
    defaults = {
        "rms_norm_eps": NORM_EPS,
        ORIGINAL_LENGTH: LENGTH,
        "max_position_embeddings": LENGTH,
    }
    whole = {**defaults, **without_agreed(c, AGREED), **_renamed(c)}
    if _is_makers(c.get("auto_map")):
        del whole["auto_map"]
    wide = size(whole, "hidden_size") // size(whole, "num_attention_heads")
    turned = rotary_dim(whole, size(whole, "head_dim", default=wide))
    windows = in_every_layer(c, default=None)
    shape = read_shape(without_share(whole), FIELDS, rotary=turned, windows=windows)
    if shape.rope_scaling is not None and not isinstance(shape.rope_scaling, LongScaling):
        # transformers knows no other here
        name = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
        raise ValueError(refused(name, c.get(name)))
    return shape


def _is_makers(code: object) -> bool:
    """Whether this is the code that transformers has taken over, and runs in its place."""
    if not isinstance(code, dict):
        return False
    models = [value for kind, value in code.items() if kind.startswith("AutoModel")]
    return bool(models) and all(value == MAKERS_CODE for value in models)


def _renamed(c: dict[str, Any]) -> dict[str, Any]:
    """The rope's fields with its type called as it is elsewhere."""
    renamed = dict[str, Any]()
    for place in ("rope_scaling", "rope_parameters"):
        rope = c.get(place)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in LONGROPE:
            rest = {name: value for name, value in rope.items() if name != "type"}
            renamed[place] = {**rest, "rope_type": "longrope"}
    return renamed


class Block(llama.Block):
    """Llama's; q, k and v are one matrix in the file, gate and up another."""

    def stored(self) -> list[Stored]:
        return [
            Stored("self_attn.o_proj.weight", "o"),
            Stored("self_attn.qkv_proj.weight", "qkv"),
            Stored("mlp.gate_up_proj.weight", "gate_up"),
            Stored("mlp.down_proj.weight", "down"),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
        ]
