"""The tokens that a model's own files say end a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retool.model.hub import read_json


def eos_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json and config.json, a number or a list in either; none
    where neither tells.

    ValueError, with the file's name, where one isn't what such a file is.
    """
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        said = read_json(path).get("eos_token_id") if path.is_file() else None
        ids: list[Any] = said if isinstance(said, list) else [] if said is None else [said]
        if not all(type(i) is int for i in ids):
            raise ValueError(
                f"{path} holds no token ids as eos_token_id ({said!r:.80}). Fetch it again."
            )
        found |= dict.fromkeys(ids)
    return tuple(found)
