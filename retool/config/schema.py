"""What a configuration is made of: frozen dataclasses whose fields are made by `option(default,
doc)`, and faults in what a user asked.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar

from omegaconf import MISSING

from retool.config.redact import redact, redact_word

C = TypeVar("C")
REQUIRED = MISSING


@dataclass(frozen=True)
class Fault:
    """Something wrong with what the user asked for: where it stands, what is wrong, and the way
    out.
    """

    where: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        where = redact_word(self.where)  # it may be the word that was typed
        return redact(f"{where}: {self.problem} {self.remedy}".rstrip())


class ConfigError(ValueError):
    """Every fault of a configuration at once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(f"- {fault}" for fault in faults))


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """A configuration and its faults. Values with a fault have their default, required ones are
    empty. `meant`: keys that the faults offer instead of others.
    """

    config: C
    faults: tuple[Fault, ...]
    meant: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Leaf:
    """A key: its dotted name, its type with and without None, and what `option` was told."""

    key: str
    type: Any
    nullable: bool
    default: Any
    doc: str
    minimum: float | None
    above: float | None
    maximum: float | None
    spellings: Mapping[str, str]

    @property
    def expected(self) -> str:
        """The type in plain words."""
        return plain_words(self.type) + (" or null" if self.nullable else "")


def option(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    spellings: Mapping[str, str] | None = None,
) -> Any:
    """A configuration field with its one line of documentation.

    `minimum`/`maximum` are inclusive bounds and `above` an exclusive one; `spellings` maps accepted
    spellings of a value to ours. `REQUIRED` as the default makes the key mandatory;
    `"${other.key}"` takes another key's value.
    """
    metadata = {
        "doc": doc,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "spellings": spellings or {},
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def leaves(schema: type, prefix: str = "") -> Iterator[Leaf]:
    """Every key of a configuration, in the order of its dataclasses.

    Required ones come first in each.
    """
    hints = typing.get_type_hints(schema)
    # Required keys first, in the help and in what is said to lack.
    for entry in sorted(fields(schema), key=lambda entry: entry.default != REQUIRED):
        kind = hints[entry.name]
        key = prefix + entry.name
        if is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), key + ".")
            continue
        bare, nullable = _without_none(kind)
        default = entry.default
        if default is NO_DEFAULT:
            default = typing.cast(Any, entry.default_factory)()
        meta = entry.metadata
        yield Leaf(
            key,
            bare,
            nullable,
            default,
            doc=meta["doc"],
            minimum=meta["minimum"],
            above=meta["above"],
            maximum=meta["maximum"],
            spellings=meta["spellings"],
        )


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether it had one."""
    if not is_union(kind):
        return kind, False
    alternatives = typing.get_args(kind)
    others = [alternative for alternative in alternatives if alternative is not type(None)]
    bare = others[0] if len(others) == 1 else typing.Union[tuple(others)]  # noqa: UP007
    return bare, len(others) < len(alternatives)


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def is_dict(kind: Any) -> bool:
    return kind is dict or typing.get_origin(kind) is dict


def plain_words(kind: Any) -> str:
    """A type as a message says it."""
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if is_union(kind):
        return " or ".join(plain_words(a) for a in args)
    if origin is Literal:
        return " or ".join(str(a) for a in args)
    if origin is tuple and args[1:] == (Ellipsis,):
        return f"a list of {plain_words(args[0])}"
    if origin is tuple:
        return f"[{', '.join(plain_words(a) for a in args)}]"
    if origin is dict:
        return "a mapping such as {name: value}"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind]
