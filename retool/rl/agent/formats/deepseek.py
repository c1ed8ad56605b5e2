"""deepseek: `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}`, of DeepSeek V3, R1 and what R1 taught."""

from __future__ import annotations

import re

from retool.rl.agent.reading.call import Call, Schemas, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark
from retool.rl.agent.reading.json_calls import read_json

SHAPE = "write <｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>"
OPENS = r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>\s*"
# R1 has a type before the name, and a fence around the arguments
NAMED = re.compile(
    r"function\s*<｜tool▁sep｜>\s*"
    r"(?P<fenced>[^\s<`{]{1,200})"
    r"\s*```(?:json)?"
    r"|(?P<bare>[^\s<`{]{1,200})"
    r"\s*<｜tool▁sep｜>",
)


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """One call; it counts, too, where what closes it is missing."""
    del schemas
    named = NAMED.match(text, mark.end())
    if named is None:
        return [unreadable("the tool call has no function name", SHAPE)], mark.end()
    try:
        value, stop = read_json(text, named.end())
    except ValueError as error:
        return [unreadable(f"the tool call {error}", SHAPE)], named.end()
    return [Call(named.group("fenced") or named.group("bare"), value)], stop


DEEPSEEK = Format(
    opens=OPENS,
    read=read,
    signs=("<｜tool▁call▁begin｜>",),
)
