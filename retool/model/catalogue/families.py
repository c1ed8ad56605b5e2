"""Which families there are, and a model's folder → its `ModelConfig`.

To add a family, copy the file of the one that is most like it and name it in `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from retool.model.block import Block
from retool.model.config import ModelConfig
from retool.model.families import (
    gemma2,
    gemma3,
    granite,
    granite4,
    llama,
    ministral,
    mistral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from retool.model.hf.fields import beside_text, has_own_code, shown
from retool.model.hub import read_json_object, require_no_adapter
from retool.model.layer_costs.cost import LayerCosts


class Family(Protocol):
    """What the file of a family has."""

    @property
    def Block(self) -> type[Block]: ...

    def read_config(self, c: dict[str, Any]) -> ModelConfig:
        """What its `config.json` says; ValueError names all that isn't implemented."""
        ...

    def costs(self, config: ModelConfig, sp: int) -> LayerCosts:
        """What a layer costs under `sp` sequence-parallel ranks."""
        ...


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "granite": granite,
    "granitemoehybrid": granite4,
    "llama": llama,
    "ministral": ministral,
    "mistral": mistral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}


def read_model_config(folder: str | Path) -> ModelConfig:
    """Read `folder/config.json`.

    ValueError names an unknown `model_type`, or a field that isn't implemented as it stands there.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        require_no_adapter(path.parent)
        way_out = _way_to_the_model(path.parent)
        raise ValueError(f"the model folder {folder} has no config.json. {way_out}")
    content = read_json_object(path)
    try:
        return parse_model_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_model_config(c: dict[str, Any]) -> ModelConfig:
    """The content of a `config.json` → `ModelConfig`, with transformers' defaults.

    ValueError names all that isn't implemented, and how to go on.
    """
    name = c.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        given = shown("model_type", name).replace("=", " ", 1)
        reasons = list(beside_text(c))
        if has_own_code(c):
            reasons.append("The model has code of its own, which isn't run here.")
        there = f"Implemented: {', '.join(FAMILIES)}, and others that docs/models.md lists."
        raise ValueError(" ".join([f"{given} is not implemented.", *reasons, there]))
    return family.read_config(c)


def _way_to_the_model(folder: Path) -> str:
    """Where the model is, if `folder` is a checkpoint of a run."""
    for inside in (folder / "huggingface", folder / "actor" / "huggingface"):
        if any(inside.glob("*.safetensors")):
            return f"The checkpoint's model is in {inside}: give that."
        if (inside / "config.json").is_file():
            merge = f"python -m retool.checkpoint merge {folder} --out DIR"
            return f"Make a model of this checkpoint: {merge}, and give DIR."
    return "Give a Hugging Face model folder: config.json, tokenizer and safetensors."
