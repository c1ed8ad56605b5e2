"""What a tool is, what its schema must look like, and what a call of it comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from retool.rl.reward.foreign import shown

if TYPE_CHECKING:
    from typing_extensions import TypeIs

T = TypeVar("T")
TRAJECTORY = "trajectory"  # of a row that tools are told: what names the trajectory among all

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

    `reward` is what the tool gives for the turn that called it; it is added up in
    `Trajectory.turn_rewards`. None: nothing. `done` ends the trajectory: the model doesn't answer.
    """

    text: str
    status: str
    seconds: float = 0.0
    queue_seconds: float = 0.0
    reward: float | None = None
    done: bool = False

    def __post_init__(self) -> None:
        self._require("text", str)
        self._require("status", str)
        self._require("seconds", (int, float))
        self._require("queue_seconds", (int, float))
        self._require("done", bool)
        if self.reward is not None:
            self._require("reward", Real)  # numpy's numbers are some, too
            if not math.isfinite(self.reward):
                raise TypeError(f"ToolResult.reward is {self.reward}: give a finite number.")

    def _require(self, name: str, kind: type | tuple[type, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind):
            raise TypeError(f"ToolResult.{name} is a {type(value).__name__}: {shown(value)}")

    @property
    def lost(self) -> bool:
        """Whether the tool failed, not its call."""
        return self.status in ("infrastructure", "sandbox_error", "not_opened")


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


@runtime_checkable
class StatefulTool(Protocol):
    """A tool that keeps a state for each trajectory that calls it.

    `open_state` makes one when a trajectory first calls the tool; `row` is its question
    (`retool.rl.agent.states.row_of`). `call_state` answers a call; those of one trajectory come one
    after the other. `close_state` ends every state that `open_state` returned, once, however the
    trajectory ends; what it returns is what the tool gives for the whole answer
    (`Trajectory.tool_scores`), or None.

    Each has its time, and may raise: `open_state` loses the trajectory then, and so does a
    connection that `call_state` can't make. `keeps_time` and `close` are a `Tool`'s.
    """

    name: str
    schema: dict[str, Any]

    async def open_state(self, row: Mapping[str, Any]) -> Any: ...

    async def call_state(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult: ...

    async def close_state(self, state: Any) -> float | None: ...

    async def close(self) -> None: ...


AnyTool = Tool | StatefulTool


def keeps_state(tool: AnyTool) -> TypeIs[StatefulTool]:
    """Which of the two a tool is. An `isinstance` of protocols takes long for every call."""
    return hasattr(tool, "open_state")


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
