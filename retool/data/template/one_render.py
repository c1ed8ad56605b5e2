"""Finding the assistant's turns in a single render, for templates that are known to show each turn
by itself.

Two renders a turn say where it stands, whatever the template does (see `template.turns`). Our own
template and those of Qwen2.5 read of a message nothing but itself and its neighbours' roles, so every
prompt, and every finished turn, is a beginning of the whole: one render says it all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from retool.data.template.turns import Turn, TurnFinder

HEADER = "<|im_start|>assistant\n"
OPENING = "<|im_start|>"


def turns_in(finder: TurnFinder, text: str, trained: Collection[int]) -> list[Turn] | None:
    """Every turn of the conversation, `text` being its render; checked as `finder.turns` does.

    None where a text of somebody's could be taken for the template's: two renders a turn tell then.
    Raises RowError as `finder.turns` does.
    """
    places = list(_places(text, finder.ends.known[0] + "\n"))
    if len(places) != len(finder.conversation.assistant_turns):
        return None
    found = list[Turn]()
    for message, (begin, end) in zip(finder.conversation.assistant_turns, places, strict=True):
        found.append(finder.made(message, text[:begin], text[begin:end], message in trained))
    return found


def _places(text: str, closing: str) -> Iterator[tuple[int, int]]:
    """Where each answer begins, and ends with what closes a message.

    Nothing more once one is followed by anything but another message.
    """
    at = text.find(HEADER)
    while at >= 0:
        begin = at + len(HEADER)
        end = text.find(closing, begin) + len(closing)
        if end < begin + len(closing) or not (end == len(text) or text.startswith(OPENING, end)):
            return
        yield begin, end
        at = text.find(HEADER, begin)
