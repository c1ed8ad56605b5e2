"""The shape of a borrowed model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from retool.model.config import ModelConfig

# Fields of config.json that change no number, beside those that begin with _ or end with _version
NOTES = frozenset(
    {
        "torch_dtype",
        "dtype",
        "architectures",
        "use_cache",
    }
)
# auto: our decoder where it has a file for the model_type
Implementation = Literal["auto", "transformers"]
MOST_WORDS = 200  # characters of another program's error


@dataclass(frozen=True)
class BorrowedConfig(ModelConfig):
    """Sizes as measured on transformers' module; what it computes with is in `content`.

    `content`: the model's config.json as text, without what changes no number. `architecture`: the
    class that transformers has for it. `longest`: most tokens of a document (0: no limit), and
    `because` the reason: a table of positions, or a sliding window of which attention isn't told.
    The logits are `logits_scale` times the head's product.
    """

    content: str = ""
    architecture: str = ""
    longest: int = 0
    because: str = ""


def content_of(config_json: dict[str, Any]) -> str:
    """The text that stands for a config.json: two of them are one model's if it is the same."""
    kept = {}
    for name, value in config_json.items():
        note = name in NOTES or name.startswith("_")
        if not note and not name.endswith("_version"):
            kept[name] = value
    return json.dumps(kept, sort_keys=True)


@lru_cache(maxsize=4)
def loaded_config(content: str) -> Any:
    """transformers' configuration object of a config.json's text.

    ValueError where transformers refuses it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = json.loads(content)
    kind = CONFIG_MAPPING[fields["model_type"]]
    try:
        with quiet():
            return kind.from_dict(fields)
    except Exception as error:  # each configuration checks its own fields, in its own way
        problem = f"transformers can't read it ({why(error)})"
        raise ValueError(problem) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own lines: it prints a whole configuration for one wrong field."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.set_verbosity(before)


def why(error: Exception) -> str:
    """Another program's error as part of a sentence of ours."""
    words = " ".join(str(error).split())
    return words[:MOST_WORDS].rstrip(".")
