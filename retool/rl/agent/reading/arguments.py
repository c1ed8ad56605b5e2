"""Arguments that a format writes as bare text, which the tool's schema gives a type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PYTHON_WORDS = {"True": True, "False": False, "None": None}


def value_of(
    text: str,
    schema: Mapping[str, Any] | None,
) -> Any:
    """What `text` means where a parameter has this schema.

    A string stays the text that it is. Anything else, and what the schema doesn't tell of, is read
    as JSON; what isn't JSON is text.
    """
    kinds = _kinds(schema or {})
    if "string" in kinds and not ("null" in kinds and text.strip() == "null"):
        return text
    bare = text.strip()
    if bare in PYTHON_WORDS:
        return PYTHON_WORDS[bare]
    try:
        return json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows, by JSON Schema's names."""
    kind = schema.get("type")
    kinds = set[str]([kind] if isinstance(kind, str) else kind or ())
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key) or ():
            kinds |= _kinds(part)
    if not kinds and isinstance(schema.get("enum"), list):
        kinds = {"string" for value in schema["enum"] if isinstance(value, str)}
    return kinds


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} isn't JSON")
