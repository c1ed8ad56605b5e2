"""Sliding windows as a `config.json` says them: of each layer, how many tokens a query sees.

transformers counts the query itself: a window of 4 shows it and the three tokens before it. Which
layers have the window differs by family.
"""

from __future__ import annotations

from typing import Any

from retool.model.hf.fields import refused, shown, size, switch

FULL = "full_attention"
SLIDING = "sliding_attention"


def window_size(c: dict[str, Any], default: int | None) -> int:
    """`sliding_window`; 0 for a null, and `default` where the file says nothing (None: no window)."""
    given = c.get("sliding_window", default)
    return 0 if given is None else size({"sliding_window": given}, "sliding_window")


def in_every_layer(c: dict[str, Any], default: int | None) -> tuple[int, ...]:
    """As Mistral and Phi-3 have it. Layers of several kinds are refused: transformers forgets them."""
    layers = size(c, "num_hidden_layers")
    window = window_size(c, default)
    kinds = c.get("layer_types")
    if kinds is not None and kinds != [SLIDING if window else FULL] * layers:
        raise ValueError(refused("layer_types", kinds))
    return (window,) * layers if window else ()


def where_switched_on(c: dict[str, Any], default: int | None) -> int:
    """`window_size` if `use_sliding_window` is true; 0 else."""
    return window_size(c, default) if switch(c, "use_sliding_window") else 0


def by_kind(c: dict[str, Any], window: int, kinds: list[str]) -> tuple[int, ...]:
    """A window in the layers that `layer_types` calls sliding; `kinds` where the file has no list."""
    layers = size(c, "num_hidden_layers")
    given = c.get("layer_types")
    named = kinds if given is None else given
    if not isinstance(named, list) or any(kind not in (FULL, SLIDING) for kind in named):
        raise ValueError(refused("layer_types", given))
    if len(named) != layers:
        raise ValueError(
            f"layer_types names {len(named)} layers, and num_hidden_layers is {layers}. Fetch it again."
        )
    if SLIDING not in named:
        return ()
    if not window:
        problem = (
            f"{shown('layer_types', given)} has sliding layers, and there is no sliding_window"
        )
        raise ValueError(f"{problem}. Fetch it again.")
    return tuple(window if kind == SLIDING else 0 for kind in named)


def from_a_layer_on(c: dict[str, Any]) -> tuple[int, ...]:
    """As Qwen has it: if it is switched on, from layer `max_window_layers` on."""
    window = where_switched_on(c, 4096)
    # transformers' default, whatever the number of layers.
    first = c.get("max_window_layers", 28)
    if window and (type(first) is not int or first < 0):
        raise ValueError(
            f"{shown('max_window_layers', first)} is no number of layers. Fetch it again."
        )
    layers = size(c, "num_hidden_layers")
    kinds = [SLIDING if window and i >= first else FULL for i in range(layers)]
    return by_kind(c, window, kinds)
