"""What Hugging Face calls a decoder's parameters outside its layers, and how a family says the rest."""

from __future__ import annotations

from typing import NamedTuple

EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.{}."
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"  # not stored where it is tied to the embedding


class Stored(NamedTuple):
    """A Hugging Face parameter and the parameter of ours that holds it.

    Several may be stacked in one of ours: `rows` of it belong to this name (None: all).
    """

    name: str
    parameter: str
    rows: int | None = None
