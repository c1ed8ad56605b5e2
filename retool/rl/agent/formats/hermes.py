"""hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, of Qwen2.5, Qwen3, SmolLM3, Granite 4."""

from __future__ import annotations

from retool.rl.agent.reading.call import Schemas, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark, after
from retool.rl.agent.reading.json_calls import call_of_json, read_json

CALL_OPENS = "<tool_call>"
CALL_CLOSES = "</tool_call>"
SHAPE = 'write <tool_call>{"name": …, "arguments": {…}}</tool_call>'


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The call of one <tool_call>; it counts, too, where the turn's end left it without its closing
    tag.

    JSON is read from the opening tag on, so a closing tag inside a string is only text.
    """
    del schemas  # names are checked where the tools are known
    after_tag = after(text, CALL_CLOSES, mark.end())
    try:
        value, stop = read_json(text, mark.end())
    except ValueError as error:
        return [unreadable(f"the tool call {error}", SHAPE)], after_tag
    # The stop token may come in the place of the closing tag.
    rest = text[stop:].lstrip()
    if not rest:
        return [call_of_json(value, SHAPE)], len(text)
    if not rest.startswith(CALL_CLOSES):
        problem = f"there is text after the JSON of the tool call ({rest[:20]!r})"
        return [unreadable(problem, SHAPE)], max(after_tag, stop)
    return [call_of_json(value, SHAPE)], len(text) - len(rest) + len(CALL_CLOSES)


HERMES = Format(
    opens=CALL_OPENS,
    read=read,
    signs=(CALL_OPENS,),
)
