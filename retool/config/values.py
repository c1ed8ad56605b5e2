"""Reading a value as the type of its key, and saying what is wrong with it."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from typing import Any, Literal

from omegaconf import OmegaConf

from retool.config.schema import Fault, Leaf, is_dict

NULLS = ("null", "none", "~", "")


def value_of(leaf: Leaf, given: Any) -> Any:
    """The given value, read as the key's type. ValueError if it can't be read."""
    return _from_text(leaf, given) if isinstance(given, str) else _plain(leaf, given)


def _from_text(leaf: Leaf, text: str) -> Any:
    """Text keys take the word as it is: a project called 007 isn't the number 7."""
    stripped = text.strip()
    if leaf.nullable and stripped.lower() in NULLS:
        return None
    value = _unquoted(stripped)
    value = leaf.spellings.get(value, value)
    is_choice = typing.get_origin(leaf.type) is Literal and value in typing.get_args(leaf.type)
    if leaf.type is str or is_choice or value.startswith("${"):
        return value
    if _is_list(leaf):
        if not value.startswith(("[", "(")):
            return [value]
        if value.startswith("("):
            value = f"[{value[1:-1]}]"
    # YAML would read 0123 as octal.
    if leaf.type is int and value.lstrip("+-").replace("_", "").isdigit():
        return int(value)
    return _plain(leaf, _yaml(value))


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text


def _yaml(text: str) -> Any:
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist(["x=" + text]), resolve=False)
        return parsed["x"]
    except Exception as error:
        raise ValueError(f"isn't readable: {' '.join(str(error).split())}") from error


def _plain(leaf: Leaf, value: Any) -> Any:
    """A parsed value: a single one for a list is a list of it; other spellings become ours."""
    if _is_list(leaf) and value is not None and not isinstance(value, (list, tuple)):
        return [value]
    if is_dict(leaf.type) and _lacks_a_space(value):
        raise ValueError(f"{value} has no space after a colon, which YAML wants")
    return leaf.spellings.get(value, value) if isinstance(value, str) else value


def _lacks_a_space(value: Any) -> bool:
    """Whether YAML took {a:1} for the key "a:1" without a value."""
    if not isinstance(value, dict):
        return False
    return any(entry is None and ":" in str(name) for name, entry in value.items())


def _is_list(leaf: Leaf) -> bool:
    return typing.get_origin(leaf.type) is tuple


# --- faults ---


def type_fault(leaf: Leaf, shown: str, error: Exception) -> Fault:
    """The fault of a value that doesn't fit the key's type."""
    choices = typing.get_args(leaf.type) if typing.get_origin(leaf.type) is Literal else ()
    near = difflib.get_close_matches(shown.partition("=")[2], map(str, choices), n=1)
    # OmegaConf's own errors say it in its own words; ours add something.
    detail = f" ({error})" if type(error) is ValueError else ""
    way_out = f"Did you mean {near[0]}?" if near else leaf.doc
    return Fault(shown, f"is not {leaf.expected}{detail}.", way_out)


def bound_faults(leaf: Leaf, value: Any) -> Iterator[Fault]:
    """A fault for each number of a value, alone or in a list, that is out of the key's bounds."""
    numbers = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    for number in typing.cast("list[Any]", numbers):
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if is_number and not _within(leaf, number):
            bounds = {"at least": leaf.minimum, "above": leaf.above, "at most": leaf.maximum}
            said = [f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None]
            yield Fault(f"{leaf.key}={number}", f"must be {' and '.join(said)}.", leaf.doc)


def _within(leaf: Leaf, number: float) -> bool:
    """False for NaN, too, where there is a bound."""
    return (
        (leaf.minimum is None or number >= leaf.minimum)
        and (leaf.above is None or number > leaf.above)
        and (leaf.maximum is None or number <= leaf.maximum)
    )
