"""mistral: what `[TOOL_CALLS]` begins: a list of JSON calls, or a name and its arguments as JSON."""

from __future__ import annotations

import re

from retool.rl.agent.reading.call import Call, Schemas, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark
from retool.rl.agent.reading.json_calls import calls_of_json, read_json

SHAPE = 'write [TOOL_CALLS][{"name": …, "arguments": {…}}]'
NAMED_SHAPE = "write [TOOL_CALLS]name[ARGS]{…}"
OPENS = r"\[TOOL_CALLS\]\s*"
NAMED = re.compile(
    r"([^\s\[\]{}]{1,200})\s*"
    r"(?:\[CALL_ID\]\s*([^\s\[\]{}]{1,80})\s*)?"
    r"(?:\[ARGS\])?\s*"
    r"(?=\{)",
)


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The calls that follow one [TOOL_CALLS]: several in a list, one where it has a name."""
    del schemas
    named = NAMED.match(text, mark.end())
    try:
        value, stop = read_json(text, mark.end() if named is None else named.end())
    except ValueError as error:
        shape = SHAPE if named is None else NAMED_SHAPE
        return [unreadable(f"the tool call {error}", shape)], mark.end()
    if named is None:
        return calls_of_json(value, SHAPE), stop
    return [Call(named.group(1), value, id=named.group(2) or "")], stop


MISTRAL = Format(
    opens=OPENS,
    read=read,
    signs=("[TOOL_CALLS]",),
)
