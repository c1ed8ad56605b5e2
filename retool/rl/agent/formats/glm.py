"""glm: `<tool_call>name` and an `<arg_key>` and `<arg_value>` for each argument, of GLM-4.5 and later."""

from __future__ import annotations

import re
from typing import Any

from retool.rl.agent.reading.arguments import value_of
from retool.rl.agent.reading.call import Call, Schemas, parameters_of, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark, after

SHAPE = (
    "write <tool_call>name\n<arg_key>argument</arg_key>\n<arg_value>value</arg_value>\n</tool_call>"
)
CALL_OPENS = "<tool_call>"
CALL_CLOSES = "</tool_call>"
NAME = re.compile(
    r"\s*([^\s<{\[]{1,200})\s*"
    r"(?=<arg_key>|</tool_call>)",
)
KEY = re.compile(
    r"\s*<arg_key>"
    r"\s*([^<\n]{1,200}?)\s*"
    r"</arg_key>\s*<arg_value>",
)
# A closing tag in the middle of a value is only text
AFTER_VALUE = re.compile(
    r"</arg_value>"
    r"(?=\s*(?:<arg_key>|</tool_call>|\Z))",
)
ENDS = re.compile(r"\s*(?:</tool_call>|\Z)")


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The call of one element. It counts, too, where the turn's end left it without its closing
    tag.
    """
    after_tag = after(text, CALL_CLOSES, mark.end())
    name = NAME.match(text, mark.end())
    if name is None:
        return [unreadable("the tool call has no function name", SHAPE)], after_tag
    schemas_of = parameters_of(name.group(1), schemas)
    arguments: dict[str, Any] = {}
    position = name.end()
    while key := KEY.match(text, position):
        closes = AFTER_VALUE.search(text, key.end())
        if closes is None:
            problem = f"the value of {key.group(1)} isn't closed"
            return [unreadable(problem, SHAPE)], after_tag
        value = text[key.end() : closes.start()]
        arguments[key.group(1)] = value_of(value, schemas_of.get(key.group(1)))
        position = closes.end()
    end = ENDS.match(text, position)
    if end is None:
        rest = text[position : position + 20].strip()
        problem = f"there is text where the tool call has its arguments ({rest!r})"
        return [unreadable(problem, SHAPE)], max(after_tag, position)
    return [Call(name.group(1), arguments)], end.end()


GLM = Format(
    opens=CALL_OPENS,
    read=read,
    signs=("<arg_key>",),
)
