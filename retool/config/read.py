"""Arguments and YAML → a typed configuration. `read` returns it with all faults, `parse` raises
them.

A word is `key=value` with a dotted key, or `config=run.yaml` for a file of them; later words win.
"""

from __future__ import annotations

import copy
import functools
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from retool.config.schema import REQUIRED, C, ConfigError, Fault, Leaf, Parsed, leaves
from retool.config.values import bound_faults, type_fault, value_of
from retool.config.words import Reader


def read(
    schema: type[C],
    words: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    ignored: Mapping[str, str] | None = None,
    *,
    base: C | None = None,
    options: Mapping[str, Any] | None = None,
) -> Parsed[C]:
    """Read words over the defaults of `schema`, or over `base`, a configuration made in Python.

    `options` are values by their dotted keys, which win over words; None asks for null. `synonyms`
    maps other names of keys to ours; `ignored` are keys of other programs that may be
    given and have no effect.
    """
    known = {leaf.key: leaf for leaf in leaves(schema)}
    reader = Reader(known, synonyms or {}, ignored or {})
    reader.read(words)
    reader.take(options or {})
    faults = reader.faults
    node, wrong = _structured(schema, base)
    faults += wrong
    # A key that a fault offers instead of another isn't said to lack, too
    refused = set(reader.meant)
    # In order, each over the one before it: that is how later words win.
    for given in reader.assignments:
        try:
            value = value_of(given.leaf, given.value)
            _put(node, given.key, value)
        except (OmegaConfBaseException, ValueError) as error:
            refused.add(given.leaf.key)
            faults.append(type_fault(given.leaf, given.shown, error))
    for leaf in known.values():
        try:
            if OmegaConf.is_missing(*_parent(node, leaf.key)):
                # What was given and refused has its fault already.
                if leaf.key not in refused:
                    way_out = f"Add {leaf.key}=…: {leaf.doc}"
                    faults.append(Fault(leaf.key, "is required and not given.", way_out))
                _put(node, leaf.key, _nothing(leaf))
            else:
                value = OmegaConf.select(node, leaf.key, throw_on_missing=True)
                if OmegaConf.is_config(value):  # whose entries are interpolated when they are read
                    OmegaConf.to_container(value, resolve=True)
                faults += _value_faults(leaf, value)
                # A shell doesn't expand it behind `key=`, and a folder called ~ is a trap
                if isinstance(value, str) and value.startswith("~/"):
                    _put(node, leaf.key, os.path.expanduser(value))
        except OmegaConfBaseException as error:  # an interpolation that leads nowhere
            problem = str(error).splitlines()[0] + "."
            way_out = "Interpolate a key that exists: ${trainer.project_name}."
            faults.append(Fault(leaf.key, problem, way_out))
            # Put in its place, not merged: a mapping would keep the entry that can't be read
            parent, last = _parent(node, leaf.key)
            with flag_override(parent, "readonly", False):
                parent[last] = _fallback(leaf)
    config = typing.cast(C, OmegaConf.to_object(node))
    return Parsed(config, tuple(faults), frozenset(reader.meant))


def parse(
    schema: type[C],
    words: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    ignored: Mapping[str, str] | None = None,
) -> C:
    """`read`, raising `ConfigError` (a ValueError) with every fault."""
    parsed = read(schema, words, synonyms, ignored)
    if parsed.faults:
        raise ConfigError(parsed.faults)
    return parsed.config


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dicts, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return value

    return plain(asdict(config))


def _structured(schema: type[C], base: C | None) -> tuple[Any, list[Fault]]:
    """The node to fill: from `base`, if there is one and it holds values of the right types."""
    # A copy: OmegaConf changes what it merges into, and the defaults are shared.
    if base is None:
        return copy.deepcopy(_defaults(schema)), []
    if not isinstance(base, schema):
        problem = f"is a {type(base).__name__}, not a {schema.__name__}."
        way_out = f"Give a {schema.__name__}(…), or dotted keys as options."
        return copy.deepcopy(_defaults(schema)), [Fault("config", problem, way_out)]
    try:
        return OmegaConf.structured(base), []
    except OmegaConfBaseException as error:
        problem = f"can't be used: {' '.join(str(error).split())}."
        return copy.deepcopy(_defaults(schema)), [Fault(f"config={schema.__name__}", problem)]


@functools.cache
def _defaults(schema: type) -> Any:
    """The node of a schema without anything given. Reading all its types takes longer than a copy."""
    return OmegaConf.structured(schema)


def _value_faults(leaf: Leaf, value: Any) -> Iterator[Fault]:
    """What is wrong with a value of the right type."""
    yield from bound_faults(leaf, value)
    if value == "" and not leaf.nullable:
        problem = "is empty: perhaps it comes from a shell variable that isn't set."
        yield Fault(f"{leaf.key}=", problem, leaf.doc)


def _nothing(leaf: Leaf) -> Any:
    """The placeholder of a required key that isn't given."""
    return () if typing.get_origin(leaf.type) is tuple else ""


def _fallback(leaf: Leaf) -> Any:
    """The placeholder of a key whose value can't be read."""
    if leaf.nullable:
        return None
    return _nothing(leaf) if leaf.default is REQUIRED else leaf.default


def _put(node: DictConfig, key: str, value: Any) -> None:
    """Set a dotted key, as its type reads the value."""
    for part in reversed(key.split(".")):
        value = {part: value}
    # `OmegaConf.merge` would copy every key for each that is given: half a second for a run of RL.
    # This one changes its first argument, which nobody else has.
    OmegaConf.unsafe_merge(node, value)


def _parent(node: Any, key: str) -> tuple[Any, str]:
    """The node that holds a key, and the key's last part."""
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    return node, last
