"""What is known of each family, as measured: read without importing torch.

`python -m tests.model.figures` in retool's repository measures it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FIGURES = Path(__file__).with_name("figures.json")


class Figures(NamedTuple):
    """Of a family's small random models, the worst.

    Relative differences from transformers of `logits` and of the `gradients` of that parameter which
    is off most, in fp32; of logits or all gradients between two sequence-parallel ranks and one (`sp`),
    in fp64.
    `engine`: how many of the tokens that it samples greedily are those of transformers' `generate`.
    `export`: whether transformers computes the same bits from an export. `template`: how many of ten
    conversations a published template of the family shows in full, without a setting ("": none was
    tried). `windows`: whether its files may ask for sliding windows.
    """

    about: str
    logits: float
    gradients: float
    sp: float
    engine: str
    export: bool
    template: str
    windows: bool


def figures_of() -> dict[str, Figures]:
    """Every family's, by `model_type`."""
    content = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {family: Figures(**row) for family, row in content.items()}


def written(number: float) -> str:
    """4e-7"""
    mantissa, exponent = f"{number:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}" if number else "0"
