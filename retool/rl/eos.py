"""The tokens that a model's own files say end a text."""

from __future__ import annotations

from pathlib import Path

from retool.model.hub import read_json


def eos_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json and config.json, a number or a list in either; none where neither tells."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        found |= dict.fromkeys(ids if isinstance(ids, list) else [ids] if ids is not None else [])
    return tuple(int(i) for i in found)
