"""granite: `<|tool_call|>[{"name": …, "arguments": {…}}]`, of Granite 3 and Phi-4-mini."""

from __future__ import annotations

from retool.rl.agent.reading.call import Schemas, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark
from retool.rl.agent.reading.json_calls import calls_of_json, read_json

SHAPE = 'write <|tool_call|>[{"name": …, "arguments": {…}}]'
OPENS = r"(?:<\|tool_call\|>|<tool_call>)\s*"  # Granite 3.1 writes the second, too


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The calls of one list, or a single one without its brackets."""
    del schemas
    try:
        value, stop = read_json(text, mark.end())
    except ValueError as error:
        return [unreadable(f"the tool call {error}", SHAPE)], mark.end()
    return calls_of_json(value, SHAPE), stop


GRANITE = Format(
    opens=OPENS,
    read=read,
    signs=("<|tool_call|>",),
)
