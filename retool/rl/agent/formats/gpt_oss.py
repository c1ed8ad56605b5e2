"""gpt_oss: a message `to=functions.name` on the commentary channel, which `<|call|>` ends."""

from __future__ import annotations

import re

from retool.rl.agent.reading.call import Call, Schemas, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark
from retool.rl.agent.reading.json_calls import read_json, skip_space

SHAPE = "write to=functions.name<|channel|>commentary json<|message|>{…}<|call|>"
# The header of a message: of a turn's first one the prompt has written the beginning. Who is spoken
# to stands before the channel or after it.
HEADER = (
    r"(?:\A|<\|start\|>assistant)"
    r"(?P<header>(?:"
    r"[^<]|<\|channel\|>|<\|constrain\|>"
    r"){0,400}?)"
    r"<\|message\|>"
)
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]{1,200})")
ENDS = ("<|call|>", "<|end|>", "<|return|>")


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The call that a message is; none where it speaks to nobody: it is a thought, or the answer."""
    del schemas
    recipient = RECIPIENT.search(mark.group("header"))
    if recipient is None:
        return [], mark.end()
    name = recipient.group(1)
    try:
        value, stop = read_json(text, mark.end())
    except ValueError as error:
        return [unreadable(f"the tool call {error}", SHAPE)], mark.end()
    stop = skip_space(text, stop)
    if stop < len(text) and not text.startswith(ENDS, stop):
        problem = f"there is text after the JSON of the tool call ({text[stop : stop + 20]!r})"
        return [unreadable(problem, SHAPE)], stop
    return [Call(name, value)], stop


GPT_OSS = Format(
    opens=HEADER,
    read=read,
    ends=("<|call|>",),
    signs=("<|channel|>commentary",),
)
