"""Tools that a model may call: what one is (`protocol`), the code interpreter (`interpreter`), and
how those of a config file are loaded (`load`).

What a tool of one's own needs is here by its short name.
"""

from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.interpreter import CodeInterpreter, result_text
from retool.rl.agent.tools.protocol import Tool, ToolResult

__all__ = ["CodeInterpreter", "FunctionTool", "Tool", "ToolResult", "result_text"]
