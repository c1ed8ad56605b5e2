"""The sizes in a `config.json` that every family has, its rope and its windows among them.

A field that would make a model compute something else than we do is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retool.model.config import Llama3Scaling, ModelConfig
from retool.model.families.fields import faults_of, number, refused, shown, size, switch


def read_shape(
    c: dict[str, Any],
    fields: frozenset[str],
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> ModelConfig:
    """The content of a `config.json` → a `ModelConfig` without biases and norms of heads.

    `fields` are those that only some families read. `kv_heads` and `head_dim` are transformers'
    defaults for a file that says nothing (None: as many as query heads; hidden size / heads).

    ValueError names all that isn't implemented, and how to go on.
    """
    layers = size(c, "num_hidden_layers")
    if faults := [*faults_of(c, fields), *_windows(c, layers)]:
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
    theta, scaling = _rope(c)
    return ModelConfig(
        family=c["model_type"],
        vocab=size(c, "vocab_size"),
        hidden=hidden,
        ffn=size(c, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(c, hidden, heads, None if "head_dim" in c else head_dim),
        norm_eps=number(c, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=switch(c, "tie_word_embeddings"),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_position=size(c, "max_position_embeddings", default=0),
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
    elif switch(c, "use_sliding_window"):
        # Where the file says nothing, transformers says this
        window = c.get("sliding_window", 4096)
        first = c.get("max_window_layers", 28)
        if window is not None and (type(first) is not int or first < layers):
            which = f"{shown('sliding_window', window)} from {shown('max_window_layers', first)} on"
            way_out = (
                "With samples no longer than the window it is the same as use_sliding_window=false: "
                "say that in the file."
            )
            yield f"use_sliding_window=True ({which}) is not implemented. {way_out}"


# --- rotary embedding ---

ROPE_KEYS = {
    "default": frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"}),
    "llama3": frozenset(
        {
            "rope_theta",
            "rope_type",
            "type",
            "partial_rotary_factor",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    ),
}


def _rope(c: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling from either spelling: transformers 4's `rope_theta` and `rope_scaling`, and
    5's `rope_parameters`.

    Where both are there transformers 5 reads `rope_scaling` and forgets the other: refused unless
    they say the same.
    """
    old, new = (_rope_dict(c, name) for name in ("rope_scaling", "rope_parameters"))
    found = _parse_rope(c, old or new)
    if old and new and found != _parse_rope(c, new):
        problem = (
            "rope_scaling and rope_parameters say different things, and transformers reads "
            "rope_scaling only"
        )
        raise ValueError(f"{problem}. Keep one of them in the file, with rope_theta in it.")
    return found


def _rope_dict(c: dict[str, Any], name: str) -> dict[str, Any]:
    value = c.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{shown(name, value)} is not a JSON object. Fetch the file again.")
    return value or {}


def _parse_rope(c: dict[str, Any], rope: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    theta = number({"rope_theta": 10_000.0, **c, **rope}, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        way_out = (
            "If it was added to generate beyond the length that the model was trained on, take it out "
            "of the file to train."
        )
        there = ", ".join(ROPE_KEYS)
        raise ValueError(
            f"{shown('rope type', kind).replace('=', ' ', 1)} is not implemented. Implemented: {there}. "
            f"{way_out}"
        )
    if unknown := sorted(map(str, rope.keys() - ROPE_KEYS[kind])):
        raise ValueError(
            f"rope type {kind!r} with {', '.join(shown(name, rope[name]) for name in unknown[:5])} "
            "is not implemented."
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(refused("partial_rotary_factor", rope["partial_rotary_factor"]))
    return theta, _llama3(c, rope) if kind == "llama3" else None


def _llama3(c: dict[str, Any], rope: dict[str, Any]) -> Llama3Scaling:
    """Where transformers looks for the original length: in a field of its own, in the scaling, in
    the length of now.
    """
    if missing := [
        name for name in ("factor", "low_freq_factor", "high_freq_factor") if name not in rope
    ]:
        raise ValueError(f"rope type 'llama3' lacks {', '.join(missing)}. Fetch the file again.")
    low = number(rope, "low_freq_factor", 1.0)
    high = number(rope, "high_freq_factor", 4.0)
    if low >= high:
        raise ValueError(
            f"low_freq_factor={low} is not below high_freq_factor={high}. Fetch the file again."
        )
    name = "original_max_position_embeddings"
    places = [c, rope, {name: c.get("max_position_embeddings")}]
    place = next((place for place in places if name in place), rope)
    return Llama3Scaling(number(rope, "factor", 1.0), low, high, size(place, name))
