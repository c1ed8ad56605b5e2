"""A run's config.yaml as flat keys.

It may be hand-made, broken or hostile: aliases can stand for more than any memory holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from retool.config.redact import redact
from retool.files.untrusted import read_bytes

CONFIG_BYTES = 256 << 10  # real ones have less than ten thousand
MAX_PARTS = 20_000  # keys and values, each as often as it is referred to
MAX_DEPTH = 20
MAX_BITS = 1024  # of a number


class _Plain(yaml.SafeLoader):
    """Mappings, lists, texts and numbers. Dates stay texts: they aren't all dates.

    No merge keys: nested ones multiply.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        del node


def read_config(path: Path, notes: list[str]) -> dict[str, str]:
    """Dotted key → value as text, without secrets; what is wrong with the file goes into `notes`."""
    if not path.exists():
        return {}
    try:
        text = read_bytes(path, CONFIG_BYTES).decode("utf-8", errors="replace")
    except ValueError as error:
        notes.append(str(error))
        return {}
    try:
        content = yaml.load(text, _Plain)
    # On broken values PyYAML's constructors raise a dozen kinds besides YAMLError
    except Exception:
        notes.append("config.yaml isn't readable YAML")
        return {}
    try:
        require_small(content)
    except ValueError as error:
        notes.append(f"config.yaml is no configuration: {error}")
        return {}
    return dict(_flat(redact(content))) if isinstance(content, dict) else {}


def require_small(content: Any) -> None:
    """ValueError for what has too many parts, or is nested too deeply, when each is counted as
    often as it is referred to.
    """
    ahead = [(content, 0)]
    for _ in range(MAX_PARTS):
        if not ahead:
            return
        value, depth = ahead.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError("it holds a number of hundreds of digits")
        ahead += [(part, depth + 1) for part in _parts(value)[:MAX_PARTS]]
    raise ValueError(f"it has more than {MAX_PARTS} parts")


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple)) else ()


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", in_words(value)


def in_words(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(in_words, value)) + "]"
    return json.dumps(value, default=str)
