"""Tools that a model may call.

`protocol` says what one is, with a state for each answer or without; `state` is such a state on its
way. `given` makes tools of what users give: functions, objects (`trajectory_tool`), verl's
(`verl`). `interpreter` runs programs, `session` those whose variables live on; `text_search` searches
texts. `load` reads the run's tools, `of_row` says which a row offers.

What a tool of one's own needs is here by its short name.
"""

from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.interpreter import CodeInterpreter, result_text
from retool.rl.agent.tools.protocol import StatefulTool, Tool, ToolResult
from retool.rl.agent.tools.text_search import TextSearch
from retool.rl.agent.tools.trajectory_tool import TrajectoryTool

__all__ = [
    "CodeInterpreter",
    "FunctionTool",
    "StatefulTool",
    "TextSearch",
    "Tool",
    "ToolResult",
    "TrajectoryTool",
    "result_text",
]
