"""`--help`, made from the dataclasses' own documentation; `--help data` for one group of keys."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast, get_type_hints

from retool.config.schema import REQUIRED, Leaf, leaves
from retool.config.words import Reader

WIDTH = 100  # at most, and where there is no terminal
NARROWEST = 40
INDENT = " " * 6


@dataclass(frozen=True)
class Command:
    """A command as its help tells of it.

    `synonyms` maps other names of keys to ours; `ignored` says what keys without effect do
    elsewhere.
    """

    schema: type
    program: str
    example: str
    synonyms: Mapping[str, str]
    ignored: Mapping[str, str]


def help_text(
    schema: type,
    program: str,
    example: str,
    synonyms: Mapping[str, str] | None = None,
    ignored: Mapping[str, str] | None = None,
    topics: Sequence[str] = (),
) -> str:
    """Every key with its type, default and meaning, as wide as the terminal; of `topics`, if any.

    A topic is a group of keys (data, rollout), a key, or a part of one. For `synonyms` and
    `ignored` see `Command`.
    """
    command = Command(schema, program, example, synonyms or {}, ignored or {})
    width = min(max(shutil.get_terminal_size((WIDTH, 24)).columns, NARROWEST), WIDTH)
    lines: list[str] = []
    if not topics:
        lines += _beginning(command, width)
        lines += _keys(command, list(leaves(schema)), width)
        lines += _without_effect(command, width)
    for topic in topics:
        lines += _topic(command, topic, width)
    return "\n".join(lines).strip("\n") + "\n"


def _beginning(command: Command, width: int) -> Iterator[str]:
    """How to call it, what it does, an example, and what the groups of keys are."""
    usage = f"usage: {command.program} [--help [GROUP]] [--check] [config=run.yaml] key=value …"
    yield from textwrap.wrap(usage, width, subsequent_indent=" " * 7, break_on_hyphens=False)
    yield ""
    yield from textwrap.wrap(inspect.cleandoc(command.schema.__doc__ or ""), width)
    later = "Later arguments override earlier ones, and the file. Example:"
    yield from ["", *textwrap.wrap(later, width), ""]
    yield from ("    " + line for line in command.example.strip().splitlines())
    yield ""
    names = ", ".join(
        head for head in by_group(command.schema, list(leaves(command.schema))) if head
    )
    for said in (
        f"--help GROUP shows one group of keys: {names}.",
        "--help WORD shows the keys that have WORD in their name.",
    ):
        yield from textwrap.wrap(said, width, break_on_hyphens=False)


def _keys(command: Command, shown: Sequence[Leaf], width: int) -> Iterator[str]:
    """Some keys, under the headings of their groups."""
    titles = dict(_groups(command.schema))
    other_names: dict[str, list[str]] = {}
    for other, ours in command.synonyms.items():
        other_names.setdefault(ours, []).append(other)
    for head, keys in by_group(command.schema, shown).items():
        title = f"{head}: {titles[head]}" if head else "Without a group:"
        yield from ["", *textwrap.wrap(title, width, break_on_hyphens=False), ""]
        for leaf in keys:
            yield from _key_lines(leaf, other_names.get(leaf.key, []), width)


def _key_lines(leaf: Leaf, other_names: list[str], width: int) -> Iterator[str]:
    default = "required" if leaf.default is REQUIRED else f"default {shown_value(leaf.default)}"
    line = f"  {leaf.key}  ({leaf.expected}; {default})"
    yield from textwrap.wrap(
        line, width, subsequent_indent=INDENT, break_on_hyphens=False, break_long_words=False
    )
    also = f" Also spelt {', '.join(other_names)}." if other_names else ""
    yield from _indented(leaf.doc + also, width)


def _without_effect(command: Command, width: int) -> Iterator[str]:
    if not command.ignored:
        return
    title = "Accepted for existing scripts, without effect here:"
    yield from ["", *textwrap.wrap(title, width), ""]
    for key, elsewhere in command.ignored.items():
        yield f"  {key}"
        yield from _indented(f"Elsewhere it {elsewhere}.", width)


def _topic(command: Command, topic: str, width: int) -> Iterator[str]:
    """The keys of a group, else those with the word in their names, else what was meant."""
    known = list(leaves(command.schema))
    dotted = f".{topic.strip('.')}."
    # Dots on both sides: `optim` is the group, and not `optimizer_offload`.
    found = [leaf for leaf in known if dotted in f".{leaf.key}."]
    found = found or [leaf for leaf in known if topic in leaf.key]
    if found:
        yield from _keys(command, found, width)
        return
    reader = Reader({leaf.key: leaf for leaf in known}, command.synonyms, command.ignored)
    ours = command.synonyms.get(topic) or reader.nearest_key(topic)
    meant = [leaf for leaf in known if leaf.key == ours]
    instead = f" {ours} is meant, perhaps:" if meant else " --help alone shows all."
    yield from textwrap.wrap(f"No key has {topic} in its name.{instead}", width)
    yield from _keys(command, meant, width)


def by_group(schema: type, shown: Sequence[Leaf]) -> dict[str, list[Leaf]]:
    """Keys under the names of their groups: each group once, those within it after it, and keys
    without a group at the end.
    """
    found: dict[str, list[Leaf]] = {}
    for leaf in shown:
        found.setdefault(leaf.key.rpartition(".")[0], []).append(leaf)
    # A group may stand among the keys of the one around it, which would be shown in pieces
    heads = [head for head, _ in _groups(schema) if head]
    return {head: found[head] for head in (*heads, "") if head in found}


def _groups(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(what its keys begin with, what it is) of every group of keys."""
    yield prefix.rstrip("."), inspect.cleandoc(schema.__doc__ or "").splitlines()[0]
    hints = get_type_hints(schema)
    for entry in fields(schema):
        if is_dataclass(hints[entry.name]):
            yield from _groups(cast(type, hints[entry.name]), f"{prefix}{entry.name}.")


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
        break_on_hyphens=False,
    )


def shown_value(value: Any) -> str:
    """A value as one would write it."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(shown_value, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
