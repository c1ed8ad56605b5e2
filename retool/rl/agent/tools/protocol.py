"""What a tool is, what its schema must look like, and what a call of it comes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")

SCHEMA_FORM = (
    "{type: function, function: {name: …, description: …, "
    "parameters: {type: object, properties: {…}, required: […]}}}"
)


@dataclass(frozen=True)
class ToolResult:
    """What a tool call came to; TypeError for values of other types than these.

    `text` is what the model reads. `status` is for the metrics: "success", "error", "timeout", and
    whatever else `sandbox.Result` knows, or "bad_arguments" where the call itself was wrong.
    `seconds` is how long the call ran (0: the loop measures it), `queue_seconds` how long it waited
    before that.

    The status "infrastructure" says that neither a program nor the model is to blame: the server
    is away, say. The trajectory ends there and isn't trained on.
    """

    text: str
    status: str
    seconds: float = 0.0
    queue_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._require("text", str)
        self._require("status", str)
        self._require("seconds", (int, float))
        self._require("queue_seconds", (int, float))

    def _require(self, name: str, kind: type | tuple[type, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind):
            raise TypeError(f"ToolResult.{name} is a {type(value).__name__}: {value!r:.80}")

    @property
    def lost(self) -> bool:
        """Whether the tool failed, not its call."""
        return self.status in ("infrastructure", "sandbox_error")


@runtime_checkable
class Tool(Protocol):
    """A function that the model can call.

    `schema` is what the chat template is given; `name` is the function's.

    Many calls are under way at once, on the thread that samples, so a `call` must `await` what
    takes time. It is given up after `multi_turn.tool_timeout_seconds`. A tool that queues its calls
    sets `keeps_time = True` and limits them itself, from the moment each one starts.

    A connection that can't be made (`ConnectionError`, httpx's `TransportError`) loses the
    trajectory. Whatever else a call raises is answered to the model.
    """

    name: str
    schema: dict[str, Any]

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult: ...

    async def close(self) -> None: ...


def function_of(schema: Any) -> dict[str, Any]:
    """The `function` of a tool's schema; its `parameters`, and what is in them, are optional.

    ValueError for a schema that the chat template, or the check of calls, couldn't use.
    """
    _require("tool_schema", schema, dict)
    function = _require("tool_schema.function", schema.get("function"), dict)
    _require("function.name", function.get("name"), str)
    parameters = _require("function.parameters", function.get("parameters") or {}, dict)
    _require("parameters.properties", parameters.get("properties") or {}, dict)
    _require("parameters.required", parameters.get("required") or [], list)
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"tool_schema can't be written as JSON ({error}): use dict, list, text and numbers."
        ) from error
    return function


def check_schema(name: str, schema: Any) -> None:
    """ValueError for a schema that can't be used, or that names another function than the tool
    `name`: no call would find it.
    """
    function_name = function_of(schema)["name"]
    if function_name != name:
        raise ValueError(
            f"the tool's name is {name!r}, its schema's function.name {function_name!r}: "
            "make them the same."
        )


def _require(name: str, value: Any, kind: type[T]) -> T:
    """`value`, or ValueError where it isn't a `kind`."""
    if isinstance(value, kind):
        return value
    if value is None:
        fault = f"{name} is missing"
    else:
        fault = f"{name} is a {type(value).__name__} ({value!r:.80}), not a {kind.__name__}"
    raise ValueError(f"{fault}: a schema is {SCHEMA_FORM}.")
