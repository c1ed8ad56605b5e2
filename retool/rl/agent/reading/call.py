"""A call as a model wrote it, and whether it can be run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

Schemas = Sequence[Mapping[str, Any]]
ID_CHARACTERS = 9
ID = re.compile(rf"[A-Za-z0-9]{{{ID_CHARACTERS}}}")
NAME_CHARACTERS_SHOWN = 80  # of a name that no tool has


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it.

    With a `problem` (a sentence for the model) it can't be run; `name` may be empty then. `id` is
    what its answer refers to: nine letters and digits, as Mistral's templates want them.
    """

    name: str
    arguments: Any
    problem: str | None = None
    id: str = field(default="", compare=False)


def unreadable(
    problem: str,
    shape: str,
) -> Call:
    """What stands for a call that can't be understood; `shape` tells what it should look like."""
    return Call("", {}, f"{problem}; {shape}.")


def with_ids(
    calls: Sequence[Call],
    text: str,
) -> list[Call]:
    """The calls of a turn, each with an `id`: the model's own, or one made of the turn's `text`."""
    base = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return [
        call if ID.fullmatch(call.id) else replace(call, id=f"{base}{k:03d}"[:ID_CHARACTERS])
        for k, call in enumerate(calls)
    ]


def function_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a schema describes, bare or in OpenAI's wrapping."""
    return schema.get("function", schema)


def parameters_of(
    name: str,
    schemas: Schemas,
) -> Mapping[str, Any]:
    """The schemas of a tool's parameters, by their names; none where there is no such tool."""
    for schema in schemas:
        function = function_of(schema)
        if function["name"] == name:
            return (function.get("parameters") or {}).get("properties") or {}
    return {}


def check(
    call: Call,
    schemas: Schemas,
) -> str | None:
    """Why `call` can't be run, in a sentence for the model; None where it can: the tool is known,
    and the arguments are an object with what is required.
    """
    if call.problem is not None:
        return call.problem
    functions: dict[str, Mapping[str, Any]] = {}
    for schema in schemas:
        function = function_of(schema)
        functions[str(function["name"])] = function
    if call.name not in functions:
        return _no_such_tool(call.name[:NAME_CHARACTERS_SHOWN], list(functions))
    if not isinstance(call.arguments, dict):
        kind = type(call.arguments).__name__
        return f"the arguments of {call.name} must be a JSON object, not {kind}."
    parameters = functions[call.name].get("parameters") or {}
    required = parameters.get("required") or []
    missing = [str(name) for name in required if name not in call.arguments]
    if not missing:
        return None
    plural = "s" if len(missing) > 1 else ""
    return f"{call.name} needs the argument{plural} {', '.join(missing)}."


def _no_such_tool(
    name: str,
    known: Sequence[str],
) -> str:
    near = get_close_matches(name, known, n=1)
    if near and len(known) > 1:
        return f"there is no tool {name!r}; did you mean {near[0]}? There is {', '.join(known)}."
    return f"there is no tool {name!r}; there is {', '.join(known) or 'none'}."
