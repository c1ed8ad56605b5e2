"""Tools that a model may call: what one is (`protocol`), the code interpreter (`interpreter`), and
how those of a config file are loaded (`load`).

What a tool of one's own needs is here by its short name.
"""

from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.interpreter import CodeInterpreter, result_text
from retool.rl.agent.tools.protocol import StatefulTool, Tool, ToolResult
from retool.rl.agent.tools.trajectory_tool import TrajectoryTool

__all__ = [
    "CodeInterpreter",
    "FunctionTool",
    "StatefulTool",
    "Tool",
    "ToolResult",
    "TrajectoryTool",
    "result_text",
]
