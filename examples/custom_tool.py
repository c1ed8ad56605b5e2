"""A tool of your own: looks things up in a table. In the file of
`rollout.multi_turn.tool_config_path`:

tools:
  - class_name: custom_tool.PriceList     # importable from where you start the run (PYTHONPATH=examples)
    config: {prices: {apple: 3, pear: 5}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retool.rl.agent.tools import ToolResult

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "price_of",
        "description": "The price of a piece of fruit.",
        "parameters": {
            "type": "object",
            "properties": {"fruit": {"type": "string"}},
            "required": ["fruit"],
        },
    },
}


class PriceList:
    """Made once per process with the `config` and `tool_schema` of the file; `call` runs for many
    trajectories at once.
    """

    def __init__(self, config: Mapping[str, Any], schema: dict[str, Any] | None) -> None:
        self.prices = dict(config["prices"])
        self.schema = schema or SCHEMA
        self.name = str(self.schema["function"]["name"])

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """What the model reads. Required arguments are there; their values may be anything."""
        fruit = str(arguments["fruit"])
        if fruit not in self.prices:
            return ToolResult(
                f"KeyError: there is no {fruit!r}; there is {', '.join(self.prices)}.", "error"
            )
        return ToolResult(str(self.prices[fruit]), "success")

    async def close(self) -> None:
        """Called at the end of the run."""
