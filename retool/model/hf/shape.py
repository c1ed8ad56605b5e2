"""The sizes in a `config.json` that every family has, its windows among them; its rope is in
`rope_fields`.

A field that would make a model compute something else than we do is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retool.model.config import ModelConfig
from retool.model.hf.fields import faults_of, number, refused, size, switch
from retool.model.hf.rope_fields import check_scaling, longest, read_rope


def read_shape(
    c: dict[str, Any],
    fields: frozenset[str],
    kv_heads: int | None = None,
    head_dim: int | None = None,
    rotary: int | None = None,
    windows: tuple[int, ...] | None = None,
) -> ModelConfig:
    """The content of a `config.json` → a `ModelConfig` without biases and norms of heads.

    `fields` are those that only some families read. `kv_heads` and `head_dim` are transformers'
    defaults for a file that says nothing (None: as many as query heads; hidden size / heads).
    `rotary`: how many of a head's channels rope turns (None: all). `windows`: of each layer, as the
    family has read them (None: a family without, and fields that give layers a window are refused).

    ValueError names all that isn't implemented, and how to go on.
    """
    layers = size(c, "num_hidden_layers")
    without = _windows(c, layers) if windows is None else ()
    if faults := [*faults_of(c, fields), *without]:
        raise ValueError(" ".join(faults))
    hidden = size(c, "hidden_size")
    heads = size(c, "num_attention_heads")
    # A file that says null means as many as query heads, whatever the default
    kv_default = heads if "num_key_value_heads" in c else kv_heads or heads
    kv_heads = size(c, "num_key_value_heads", default=kv_default)
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
        )
    head_dim = _head_dim(c, hidden, heads, None if "head_dim" in c else head_dim)
    theta, scaling = read_rope(c)
    check_scaling(scaling, rotary or head_dim)
    return ModelConfig(
        family=c["model_type"],
        vocab=size(c, "vocab_size"),
        hidden=hidden,
        ffn=size(c, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=number(c, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=switch(c, "tie_word_embeddings"),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_position=longest(c, scaling),
        windows=windows or (),
        rotary_dim=rotary if rotary and rotary < head_dim else 0,
    )


def _head_dim(c: dict[str, Any], hidden: int, heads: int, default: int | None) -> int:
    """Channels of a head; rotary embedding turns them in pairs."""
    head_dim = size(c, "head_dim", default=default or hidden // heads)
    if head_dim % 2 or not head_dim:
        raise ValueError(
            f"head_dim={head_dim} is not implemented: rotary embedding needs an even number."
        )
    return head_dim


def _windows(c: dict[str, Any], layers: int) -> Iterator[str]:
    """Fields by which a layer would see a part of the sequence only, unless no layer does."""
    given = c.get("layer_types")
    if given is not None:
        if isinstance(given, list) and len(given) != layers:
            yield f"layer_types names {len(given)} layers, and num_hidden_layers is {layers}. Fetch it again."
        elif given != ["full_attention"] * layers:
            yield refused("layer_types", given)
