"""What the schema of a tool must be: `{"type": "function", "function": {"name", "description",
"parameters"}}`, all of it JSON.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

T = TypeVar("T")
FORM = (
    "{type: function, function: {name: …, description: …, parameters: {type: object, properties: {…}, "
    "required: […]}}}"
)


def function_of(schema: Any) -> dict[str, Any]:
    """The `function` of a schema, `parameters` and what is in them optional. ValueError where the
    chat template or the check of calls couldn't use it.
    """
    function = _part(
        "tool_schema", _part("tool_schema", schema, dict).get("function"), dict, "function"
    )
    _part("function", function.get("name"), str, "name")
    parameters = _part("function", function.get("parameters") or {}, dict, "parameters")
    _part("parameters", parameters.get("properties") or {}, dict, "properties")
    _part("parameters", parameters.get("required") or [], list, "required")
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"tool_schema can't be written as JSON ({error}): use dict, list, text and numbers."
        ) from error
    return function


def _part(inside: str, value: Any, kind: type[T], key: str | None = None) -> T:
    if isinstance(value, kind):
        return value
    name = inside if key is None else f"{inside}.{key}"
    found = (
        f"{name} is missing"
        if value is None
        else f"{name} is a {type(value).__name__} ({value!r:.80}), not a {kind.__name__}"
    )
    raise ValueError(f"{found}: a schema is {FORM}.")


def check_schema(name: str, schema: Any) -> None:
    """ValueError where the schema can't be used, or names another function than the tool `name`: no
    call would find it.
    """
    if (other := function_of(schema)["name"]) != name:
        raise ValueError(
            f"the tool's name is {name!r}, its schema's function.name {other!r}: make them the same."
        )
