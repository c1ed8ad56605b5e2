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
VALUE_CLOSES = re.compile(
    r"\n?</parameter>(?=\s*"
    r"(?:<parameter=|</function>|</tool_call>|\Z)"
    r")",
)
# The model forgot to close the value
NEXT_ELEMENT = re.compile(r"\n?(?=<parameter=|</function>)")


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
    closes = VALUE_CLOSES.search(text, position)
    while parameter := PARAMETER.match(text, position):
        key = parameter.group(1).strip()
        begin = parameter.end()
        # Searched for once: a turn may open thousands that it never closes
        if closes is not None and closes.start() < begin:
            closes = VALUE_CLOSES.search(text, begin)
        value, position = _value(text, begin, closes)
        arguments[key] = value_of(value, schemas_of.get(key))
    end = ENDS.match(text, position)
    assert end is not None  # all of it may be missing
    rest = text[end.end() :][:20]
    if rest and not end.group().strip():
        problem = f"there is text where the tool call has its parameters ({rest!r})"
        return [unreadable(problem, SHAPE)], position
    return [Call(name, arguments)], end.end()


def _value(
    text: str,
    begin: int,
    closes: Mark | None,
) -> tuple[str, int]:
    """The value that begins there, without the line breaks around it; and where it ends."""
    closes = closes or NEXT_ELEMENT.search(text, begin)
    end = closes.start() if closes is not None else len(text)
    value = text[begin:end].removeprefix("\n")
    if closes is None:
        return value.rstrip(), end
    return value, closes.end()


QWEN3_CODER = Format(
    opens=OPENS,
    read=read,
    signs=("<function=",),
)
