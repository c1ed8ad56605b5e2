"""llama3_json: `{"name": …, "parameters": {…}}` on a line of its own, of Llama 3.1, 3.2 and 3.3."""

from __future__ import annotations

from typing import Any

from retool.rl.agent.reading.call import Call, Schemas, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark
from retool.rl.agent.reading.json_calls import call_of_json, read_json, skip_space

SHAPE = 'write {"name": …, "parameters": {…}}'
# A call is what this token begins, or a line that begins as one
TAG = "<|python_tag|>"
OPENS = r"<\|python_tag\|>\s*|(?:^|(?<=</think>))[ \t]*(?=\{\s*\"(?:name|type)\")"


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The calls that follow the mark, with a semicolon (Phi-4-mini: a comma) between them.

    An object that isn't a call is only what the model said.
    """
    del schemas
    calls: list[Call] = []
    position = mark.end()
    tagged = mark.group().startswith(TAG)
    while True:
        try:
            value, stop = read_json(text, position)
        except ValueError as error:
            calls.append(unreadable(f"the tool call {error}", SHAPE))
            return calls, _next_line(text, position)
        if tagged or _is_call(value):
            calls.append(call_of_json(value, SHAPE))
        position = skip_space(text, stop)
        if not text.startswith((";", ","), position):
            return calls, stop
        position += 1
        if not text.startswith("{", skip_space(text, position)):
            return calls, position


def _is_call(value: Any) -> bool:
    """Whether an object is a call by its keys."""
    return (
        isinstance(value, dict)
        and "name" in value
        and {"parameters", "arguments"} & value.keys() != set()
    )


def _next_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


LLAMA3_JSON = Format(
    opens=OPENS,
    read=read,
    ends=("<|eom_id|>",),
    signs=('{"name": function name',),
)
