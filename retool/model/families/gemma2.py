"""Gemma 2: norms before and after attention and the MLP, whose weights are stored less 1; caps of
attention's scores and of the logits; every other layer has a window.

The list of families is in `retool.model.catalogue.families`.

Legend: t tokens of this rank · N query heads · K kv heads · H head dim · D model · E = N·H · F ffn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from retool.model import block
from retool.model.block import Execution, new_parameter, rms_norm
from retool.model.config import ModelConfig
from retool.model.fused.gated import gated_down
from retool.model.hf.fields import number, refused, size, switch, without_agreed
from retool.model.hf.names import Stored, gate_up_down, query_key_value
from retool.model.hf.shape import read_shape
from retool.model.hf.windows import FULL, SLIDING, by_kind, window_size
from retool.model.layer_costs.cost import Cost, LayerCosts, Uncompiled
from retool.model.layer_costs.dense import gated_block_costs
from retool.model.rope import rotate

# beside those that every family has
FIELDS = frozenset(
    {
        "sliding_window",
        "attention_bias",
        "query_pre_attn_scalar",
        "hidden_activation",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)
ACTIVATION = "gelu_pytorch_tanh"
# transformers' defaults
HEAD_DIM = 256
KV_HEADS = 4
WINDOW = 4096
SCORE_CAP = 50.0
LOGITS_CAP = 30.0


def read_config(c: dict[str, Any]) -> ModelConfig:
    """`query_pre_attn_scalar` stands where others have H in 1/√H; `attention_bias` gives biases to q,
    k, v and o; a cap that is null is none. Without `layer_types` the first, third, … layer has the
    window.
    """
    kinds = [FULL if i % 2 else SLIDING for i in range(size(c, "num_hidden_layers"))]
    window = window_size(c, WINDOW)
    windows = by_kind(c, window, kinds)
    agreed = {"hidden_act": ACTIVATION, "sliding_window_size": window}
    tied = {"tie_word_embeddings": True, **without_agreed(c, agreed)}
    shape = read_shape(tied, FIELDS, KV_HEADS, HEAD_DIM, windows=windows)
    return replace(
        as_gemma(c, shape),
        score_cap=_cap(c, "attn_logit_softcapping", SCORE_CAP),
        logits_cap=_cap(c, "final_logit_softcapping", LOGITS_CAP),
    )


def as_gemma(c: dict[str, Any], shape: ModelConfig) -> ModelConfig:
    """What Gemma 2 and 3 have beside the sizes: norms, scales, biases."""
    if c.get("hidden_activation", ACTIVATION) != ACTIVATION:
        raise ValueError(refused("hidden_activation", c["hidden_activation"]))
    biased = switch(c, "attention_bias")
    return replace(
        shape,
        qkv_bias=biased,
        o_bias=biased,
        norms_less_one=True,
        embedding_scale=math.sqrt(shape.hidden),
        rounded_embedding_scale=True,
        score_scale=math.sqrt(shape.head_dim / number(c, "query_pre_attn_scalar", 256.0)),
    )


def _cap(c: dict[str, Any], name: str, default: float) -> float:
    given = c.get(name, default)
    return 0.0 if given is None else number({name: given}, name, default)


def costs(
    config: ModelConfig, sp: int, more: tuple[Cost, ...] = (), uncompiled: tuple[Cost, ...] = ()
) -> LayerCosts:
    """`more` and `uncompiled` as in `gated_block_costs`."""
    plain = gated_block_costs(config, sp, more=more)
    added = (
        Cost("what attention and the MLP add, before its norm", 2 * config.hidden),
        Cost("those norms' scales", 2, "fp32"),
    )
    # A norm keeps its input, and that scaled, both in the dtype of sums
    before = (
        Cost("the first norm's input", config.hidden, "widened"),
        Cost("it, scaled", config.hidden, "sums"),
    )
    after = Cost(
        "the other norms' six, in place of four in the weights' dtype", 4 * config.hidden, "sums"
    )
    gated = Cost("gelu of gate, and its product with up", 2 * config.ffn)
    return replace(
        plain,
        kept={**plain.kept, "none": (*plain.kept["none"], *added)},
        uncompiled=Uncompiled((*before, *uncompiled), (after, gated)),
    )


class Block(block.Block):
    """norm → q k v → rope → attention → o → norm, norm → gated MLP → norm."""

    rope_is_fusible = True

    def __init__(self, config: ModelConfig, index: int, execution: Execution) -> None:
        super().__init__(config, index, execution)
        c = config
        qkv_rows = c.query_width + 2 * c.key_width
        self.qkv = new_parameter(qkv_rows, c.hidden)
        self.qkv_bias = new_parameter(qkv_rows) if c.qkv_bias else None
        self.o = new_parameter(c.hidden, c.query_width)
        self.o_bias = new_parameter(c.hidden) if c.o_bias else None
        self.gate_up = new_parameter(2 * c.ffn, c.hidden)
        self.down = new_parameter(c.hidden, c.ffn)
        self.norm_1 = new_parameter(c.hidden)
        self.norm_2 = new_parameter(c.hidden)
        self.norm_3 = new_parameter(c.hidden)
        self.norm_4 = new_parameter(c.hidden)

    def projected(self, x_tD: torch.Tensor) -> torch.Tensor:
        return self.by_head(F.linear(self.normed(x_tD, self.norm_1), self.qkv, self.qkv_bias))

    def rotated(
        self, heads_tJH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_k_v(heads_tJH)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after(self, x_tD: torch.Tensor, a_tE: torch.Tensor) -> torch.Tensor:
        x_tD = x_tD + self.normed(F.linear(a_tE, self.o, self.o_bias), self.norm_2)
        gate_up_tG = F.linear(self.normed(x_tD, self.norm_3), self.gate_up)
        added = gated_down(gate_up_tG, self.down, None, "gelu_tanh")
        return x_tD + self.normed(added, self.norm_4)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.config.norm_eps, less_one=True)

    def attention_stored(self) -> list[Stored]:
        """The names of attention's parameters."""
        return [
            *query_key_value(self.config),
            Stored("self_attn.o_proj.weight", "o"),
            Stored("self_attn.o_proj.bias", "o_bias"),
        ]

    def stored(self) -> list[Stored]:
        return [
            *self.attention_stored(),
            *gate_up_down(self.config),
            Stored("input_layernorm.weight", "norm_1"),
            Stored("post_attention_layernorm.weight", "norm_2"),
            Stored("pre_feedforward_layernorm.weight", "norm_3"),
            Stored("post_feedforward_layernorm.weight", "norm_4"),
        ]
