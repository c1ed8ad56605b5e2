"""`--help`, made from the dataclasses' own documentation."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from retool.config.schema import REQUIRED, Leaf, leaves

WIDTH = 100
INDENT = " " * 6


def help_text(
    schema: type,
    program: str,
    example: str,
    synonyms: Mapping[str, str] | None = None,
    ignored: Mapping[str, str] | None = None,
) -> str:
    """Every key with its type, default and meaning.

    `synonyms` maps other names of keys to ours; `ignored` says what keys without effect do
    elsewhere.
    """
    other_names: dict[str, list[str]] = {}
    for other, ours in (synonyms or {}).items():
        other_names.setdefault(ours, []).append(other)
    lines = [f"usage: {program} [--help] [--check] [config=run.yaml] key=value …", ""]
    lines += textwrap.wrap(inspect.cleandoc(schema.__doc__ or ""), WIDTH)
    lines += ["", "Later words win over earlier ones and over the file. Example:", ""]
    lines += ["    " + line for line in example.strip().splitlines()]
    group = None
    for leaf in leaves(schema):
        head = leaf.key.rpartition(".")[0]
        if head != group:
            lines.append("")
            group = head
        lines += _key_lines(leaf, other_names.get(leaf.key, []))
    if ignored:
        lines += ["", "Accepted for existing scripts, without effect here:", ""]
        for key, elsewhere in ignored.items():
            lines += [f"  {key}", *_indented(f"Elsewhere it {elsewhere}.")]
    return "\n".join(lines) + "\n"


def _key_lines(leaf: Leaf, other_names: list[str]) -> Iterator[str]:
    default = "required" if leaf.default is REQUIRED else f"default {_shown(leaf.default)}"
    yield f"  {leaf.key}  ({leaf.expected}; {default})"
    also = f" Also spelt {', '.join(other_names)}." if other_names else ""
    yield from _indented(leaf.doc + also)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
        break_on_hyphens=False,
    )


def _shown(value: Any) -> str:
    """A value as one would write it."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_shown, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
