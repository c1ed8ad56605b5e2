"""qwen3_coder: `<function=…>` with a `<parameter=…>` for each argument, of Qwen3-Coder and Qwen3.5."""

from __future__ import annotations

import re
from typing import Any

from retool.rl.agent.reading.arguments import value_of
from retool.rl.agent.reading.call import Call, Schemas, parameters_of, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark

SHAPE = (
    "write <tool_call>\n<function=name>\n"
    "<parameter=argument>\n"
    "value\n"
    "</parameter>\n"
    "</function>\n</tool_call>"
)
OPENS = (
    r"(?:<tool_call>\s*)?"
    r"<function=(?P<name>[^>\n]{0,200})>"
    r"|<tool_call>"
)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]{1,200})>")
ENDS = re.compile(r"\s*(?:</function>)?\s*(?:</tool_call>)?")
# A closing tag in the middle of a value is only text
AFTER_VALUE = re.compile(
    r"\n?</parameter>(?=\s*"
    r"(?:<parameter=|</function>|</tool_call>|\Z)"
    r")",
)
# The model forgot to close the value
NEXT_ELEMENT = re.compile(r"\n?(?=<parameter=|</function>)|\s*\Z")


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The call of one function element. It counts, too, where closing tags are missing."""
    name = (mark.group("name") or "").strip()
    if not name:
        return [unreadable("the tool call has no function name", SHAPE)], mark.end()
    schemas_of = parameters_of(name, schemas)
    arguments: dict[str, Any] = {}
    position = mark.end()
    while parameter := PARAMETER.match(text, position):
        key = parameter.group(1).strip()
        value, position = _value(text, parameter.end())
        arguments[key] = value_of(value, schemas_of.get(key))
    end = ENDS.match(text, position)
    assert end is not None  # all of it may be missing
    rest = text[end.end() :][:20]
    if rest and not end.group().strip():
        problem = f"there is text where the tool call has its parameters ({rest!r})"
        return [unreadable(problem, SHAPE)], position
    return [Call(name, arguments)], end.end()


def _value(text: str, start: int) -> tuple[str, int]:
    """The value that begins at `start`, without the line breaks around it; and where it ends."""
    if text.startswith("\n", start):
        start += 1
    closes = AFTER_VALUE.search(text, start)
    if closes is None:
        closes = NEXT_ELEMENT.search(text, start)
        assert closes is not None  # the text has an end
    return text[start : max(closes.start(), start)], closes.end()


QWEN3_CODER = Format(
    opens=OPENS,
    read=read,
    signs=("<function=",),
)
