"""Rotary embedding as a `config.json` says it: theta, and the scaling for longer contexts.

There are two spellings, transformers 4's `rope_theta` and `rope_scaling` and transformers 5's
`rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from retool.model.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeScaling,
    YarnScaling,
)
from retool.model.hf.fields import number, refused, shown, size, switch

EVERY = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
ORIGINAL_LENGTH = "original_max_position_embeddings"
# The fields that each type may have; the rest would compute something else.
ROPE_KEYS = {
    "default": EVERY,
    "linear": EVERY | {"factor"},
    "dynamic": EVERY | {"factor"},
    "longrope": EVERY
    | {"factor", "attention_factor", "short_factor", "long_factor", ORIGINAL_LENGTH},
    "llama3": EVERY | {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH},
    "yarn": EVERY
    | {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        ORIGINAL_LENGTH,
    },
}


def read_rope(c: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from either spelling.

    Where both are there transformers 5 reads `rope_scaling` and forgets the other: refused unless
    they say the same.
    """
    old, new = (_rope_dict(c, name) for name in ("rope_scaling", "rope_parameters"))
    found = parse_rope(c, old or new)
    # Both spellings are common. Where they agree nothing is in doubt.
    if old and new and found != parse_rope(c, new):
        problem = (
            "rope_scaling and rope_parameters say different things, and transformers reads "
            "rope_scaling only"
        )
        raise ValueError(f"{problem}. Keep one of them in the file, with rope_theta in it.")
    return found


def rotary_dim(c: dict[str, Any], head_dim: int) -> int:
    """How many of a head's channels rope turns, as a share in either place says; pairs of them.

    Only for families of which transformers turns a part: of others the share is refused.
    """
    rope = _rope_dict(c, "rope_scaling") or _rope_dict(c, "rope_parameters")
    name = "partial_rotary_factor"
    share = number({**c, **rope}, name, 1.0)
    turned = int(head_dim * share)
    if share > 1 or turned < 2 or turned % 2:
        raise ValueError(
            f"{shown(name, share)} of {head_dim} channels is not implemented: rotary embedding needs an "
            "even number of them."
        )
    return turned


def without_share(c: dict[str, Any]) -> dict[str, Any]:
    """The fields without what `rotary_dim` reads."""
    name = "partial_rotary_factor"
    rest = {key: value for key, value in c.items() if key != name}
    for place in ("rope_scaling", "rope_parameters"):
        if isinstance(c.get(place), dict):
            rest[place] = {key: value for key, value in c[place].items() if key != name}
    return rest


def check_scaling(scaling: RopeScaling | None, turned: int) -> None:
    """That LongRoPE has a divisor for each pair of channels, and dynamic NTK more than a pair."""
    if isinstance(scaling, LongScaling):
        for name, factors in (("short_factor", scaling.short), ("long_factor", scaling.long)):
            if len(factors) != turned // 2:
                raise ValueError(
                    f"{name} has {len(factors)} numbers, and there are {turned // 2} pairs of channels. "
                    "Fetch it again."
                )
    if isinstance(scaling, DynamicScaling) and turned < 4:
        raise ValueError(f"rope type 'dynamic' is not implemented for {turned} channels.")


def longest(c: dict[str, Any], scaling: RopeScaling | None) -> int:
    """The most positions that the file says the model takes; 0 where it doesn't say.

    With YaRN the field often keeps the length from before: `factor` times the original counts.
    """
    said = size(c, "max_position_embeddings", default=0)
    if isinstance(scaling, YarnScaling):
        return max(said, int(scaling.factor * scaling.original_max_position))
    return said


def _rope_dict(c: dict[str, Any], name: str) -> dict[str, Any]:
    value = c.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{shown(name, value)} is not a JSON object. Fetch the file again.")
    return value or {}


def parse_rope(c: dict[str, Any], rope: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of one dict; what isn't in it is in the file's other fields `c`."""
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
        told = ", ".join(shown(name, rope[name]) for name in unknown[:5])
        raise ValueError(
            f"rope type {kind!r} with {told} is not implemented. If the model doesn't compute with it, "
            "take it out of the file. (transformers doesn't; what it multiplies cos and sin with is "
            "attention_factor.)"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(refused("partial_rotary_factor", rope["partial_rotary_factor"]))
    if kind == "yarn" and theta <= 1:
        raise ValueError(
            f"rope_theta={theta} is not above 1, as YaRN needs it. Fetch the file again."
        )
    return theta, READERS[kind](c, rope)


def _none(c: dict[str, Any], rope: dict[str, Any]) -> None:
    return None


def _linear(c: dict[str, Any], rope: dict[str, Any]) -> LinearScaling:
    _require(rope, "linear", "factor")
    return LinearScaling(number(rope, "factor", 1.0))


def _dynamic(c: dict[str, Any], rope: dict[str, Any]) -> DynamicScaling:
    _require(rope, "dynamic", "factor")
    return DynamicScaling(number(rope, "factor", 1.0), size(c, "max_position_embeddings"))


def _longrope(c: dict[str, Any], rope: dict[str, Any]) -> LongScaling:
    _require(rope, "longrope", "short_factor", "long_factor")
    original = _original_length(c, rope)
    if rope.get("factor") is not None:
        factor = number(rope, "factor", 1.0)
    else:
        factor = size(c, "max_position_embeddings") / original
    if rope.get("attention_factor") is not None:
        attention = number(rope, "attention_factor", 1.0)
    elif factor <= 1:
        attention = 1.0
    else:
        # As transformers computes it where the file doesn't say.
        attention = math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return LongScaling(
        _divisors(rope, "short_factor"), _divisors(rope, "long_factor"), attention, original
    )


def _divisors(rope: dict[str, Any], name: str) -> tuple[float, ...]:
    value = rope[name]
    if not isinstance(value, list):
        raise ValueError(f"{shown(name, value)} is no list of numbers. Fetch it again.")
    return tuple(number({name: each}, name, 1.0) for each in value)


def _llama3(c: dict[str, Any], rope: dict[str, Any]) -> Llama3Scaling:
    _require(rope, "llama3", "factor", "low_freq_factor", "high_freq_factor")
    low = number(rope, "low_freq_factor", 1.0)
    high = number(rope, "high_freq_factor", 4.0)
    if low >= high:
        raise ValueError(
            f"low_freq_factor={low} is not below high_freq_factor={high}. Fetch the file again."
        )
    return Llama3Scaling(number(rope, "factor", 1.0), low, high, _original_length(c, rope))


def _yarn(c: dict[str, Any], rope: dict[str, Any]) -> YarnScaling:
    """A field that says null, or 0, is as if it weren't there, as in transformers."""
    _require(rope, "yarn", "factor")
    given = {name: value for name, value in rope.items() if value not in (None, 0)}
    factor = number(rope, "factor", 1.0)
    if "attention_factor" in given:
        attention = number(given, "attention_factor", 1.0)
    elif "mscale" in given and "mscale_all_dim" in given:
        above = _temperature(factor, number(given, "mscale", 1.0))
        attention = above / _temperature(factor, number(given, "mscale_all_dim", 1.0))
    else:
        attention = _temperature(factor)
    fast = number(given, "beta_fast", 32.0)
    slow = number(given, "beta_slow", 1.0)
    if fast <= slow:
        raise ValueError(f"beta_fast={fast} is not above beta_slow={slow}. Fetch the file again.")
    truncate = switch(rope, "truncate") if "truncate" in rope else True
    return YarnScaling(factor, attention, fast, slow, truncate, _original_length(c, rope))


def _temperature(factor: float, scale: float = 1.0) -> float:
    """How much sharper attention is over a context so much longer (the paper's section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _require(rope: dict[str, Any], kind: str, *names: str) -> None:
    if missing := [name for name in names if name not in rope]:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)}. Fetch the file again.")


def _original_length(c: dict[str, Any], rope: dict[str, Any]) -> int:
    """Where transformers looks for it: in a field of its own, in the scaling, in the length of
    now.
    """
    places = [c, rope, {ORIGINAL_LENGTH: c.get("max_position_embeddings")}]
    place = next((place for place in places if ORIGINAL_LENGTH in place), rope)
    return size(place, ORIGINAL_LENGTH)


READERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], RopeScaling | None]] = {
    "default": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
