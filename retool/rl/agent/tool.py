"""What a tool is, and what a call of it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class ToolResult:
    """What a tool call came to: `text` for the model, `status` for the metrics ("success", "error",
    "timeout", …; see `sandbox.Result`, and "bad_arguments" where the call itself was wrong), the
    seconds it ran (0: they are measured) and those it waited to be run.

    `status` "infrastructure" says that no program and no model is to blame: the server is away,
    say. The trajectory ends there and isn't trained on. TypeError for anything else than these
    types.
    """

    text: str
    status: str
    seconds: float = 0.0
    queue_seconds: float = 0.0

    @property
    def lost(self) -> bool:
        """Whether the tool failed, not its call."""
        return self.status in ("infrastructure", "sandbox_error")

    def __post_init__(self) -> None:
        for name, kind in (
            ("text", str),
            ("status", str),
            ("seconds", (int, float)),
            ("queue_seconds", (int, float)),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"ToolResult.{name} is a {type(value).__name__}: {value!r:.80}")


@runtime_checkable
class Tool(Protocol):
    """A function the model can call.

    `schema` is what the chat template is given; `name` is the function's.

    Many calls are under way at once, on the thread that samples: a `call` must `await` what takes
    time, not wait for it. It is given up after `multi_turn.tool_timeout_seconds`; a tool that
    queues its calls sets `keeps_time = True` and limits them itself, from their start. A connection
    that can't be made (`ConnectionError`, httpx's `TransportError`) loses the trajectory; whatever
    else it raises is answered to the model.
    """

    name: str
    schema: dict[str, Any]

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult: ...

    async def close(self) -> None: ...
