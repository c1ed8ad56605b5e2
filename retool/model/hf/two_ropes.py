"""A rope for layers with a window and another for the rest, as OLMo 3's and Gemma 3's files have it.

transformers reads `rope_parameters` with a dict for each kind of layer. In older files `rope_theta`
and `rope_scaling` are those of the layers that see everything.
"""

from __future__ import annotations

from typing import Any

from retool.model.config import DynamicScaling, LongScaling, RopeScaling
from retool.model.hf.fields import refused
from retool.model.hf.rope_fields import ORIGINAL_LENGTH, parse_rope
from retool.model.hf.windows import FULL, SLIDING

OURS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", ORIGINAL_LENGTH})


def split_ropes(
    c: dict[str, Any], theta: float, window_theta: float
) -> tuple[dict[str, Any], tuple[float, RopeScaling | None]]:
    """(the fields with the rope of layers that see everything alone, the other layers' rope).

    The thetas are those of a file that says nothing. ValueError for a rope that goes by the
    document's length, and for one that isn't given by kind of layer.
    """
    by_kind = c.get("rope_parameters")
    scaling = c.get("rope_scaling")
    # Where both spellings are there, transformers writes one over the other
    unclear = by_kind is not None and scaling is not None
    name = "rope_parameters" if scaling is None else "rope_scaling"
    if unclear or not _is_by_kind(by_kind) or not isinstance(scaling, (dict, type(None))):
        raise ValueError(refused(name, c[name]))
    given = by_kind or {}
    rest = {name: value for name, value in c.items() if name not in OURS}
    # transformers starts from the default type, which a file's "type" doesn't change
    full = given.get(FULL) or {"rope_type": "default", **(scaling or {})}
    whole = {**rest, "rope_theta": c.get("rope_theta", theta), "rope_parameters": full}
    windowed = given.get(SLIDING) or {}
    found = parse_rope({**rest, "rope_theta": window_theta}, windowed)
    for kind, rope in ((FULL, full), (SLIDING, windowed)):
        # It doesn't find `truncate` where ropes go by kind of layer
        if rope.get("truncate", True) is not True:
            raise ValueError(refused(f"{kind}.truncate", rope["truncate"]))
    # Both depend on how long a document is, which isn't implemented for each kind of layer by
    # itself.
    for _, one in (parse_rope(whole, full), found):
        if isinstance(one, (DynamicScaling, LongScaling)):
            raise ValueError(refused(name, c[name]))
    return whole, found


def _is_by_kind(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() - {FULL, SLIDING}:
        return False
    return all(rope is None or isinstance(rope, dict) for rope in value.values())
