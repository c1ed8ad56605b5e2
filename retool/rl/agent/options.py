"""What all episodes of a run share: the limits, the tools, and how a conversation is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retool.data.render.renderer import Renderer
from retool.rl.agent.tools.protocol import Tool


@dataclass(frozen=True)
class AgentOptions:
    """Limits of a trajectory.

    `max_response_length` counts the tokens of all turns and of the tools' text. `format` is how
    calls are written (a name of `formats.PARSERS`). `eos_ids` are tokens that end everything,
    besides those that the renderer knows to end a turn.
    """

    max_response_length: int
    max_assistant_turns: int | None = None
    max_user_turns: int | None = None
    format: str = "hermes"
    max_tool_response_length: int = 512
    truncate_side: str = "middle"
    max_parallel_calls: int = 1
    tool_timeout_seconds: float = 120.0
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Agent:
    """What stands around the model, the same in every episode; `tools` by their names."""

    tools: Mapping[str, Tool]
    renderer: Renderer
    options: AgentOptions

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What a call is checked against."""
        return [tool.schema for tool in self.tools.values()]
