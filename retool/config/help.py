"""`--help`, made from the dataclasses' own documentation."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from retool.config.schema import REQUIRED, leaves


def help_text(
    schema: type, program: str, example: str, synonyms: Mapping[str, str] | None = None
) -> str:
    """`--help`: every key with its type, default and meaning, made from the dataclasses' own
    documentation.
    """
    spelt: dict[str, list[str]] = {}
    for other, ours in (synonyms or {}).items():
        spelt.setdefault(ours, []).append(other)
    lines = [f"usage: {program} [--help] [--check] [config=run.yaml] key=value …", ""]
    lines += textwrap.wrap(inspect.cleandoc(schema.__doc__ or ""), 100)
    lines += ["", "Later words win over earlier ones and over the file. Example:", ""]
    lines += ["    " + line for line in example.strip().splitlines()]
    group = None
    for leaf in leaves(schema):
        head = leaf.key.rpartition(".")[0]
        if head != group:
            lines.append("")
            group = head
        default = "required" if leaf.default is REQUIRED else f"default {_shown(leaf.default)}"
        lines.append(f"  {leaf.key}  ({leaf.expected}; {default})")
        text = leaf.doc + (
            f" Also spelt {', '.join(spelt[leaf.key])}." if leaf.key in spelt else ""
        )
        lines += textwrap.wrap(
            text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_shown(v) for v in value) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )
