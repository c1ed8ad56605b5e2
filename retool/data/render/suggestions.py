"""What to do about a row that a template can't show.

Each setting is tried on the row itself, and named only if it works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from retool.data.read.refused_rows import kind_of
from retool.data.read.rows import Conversation
from retool.data.render.inline_outputs import CLOSES, OPENS
from retool.data.template.completeness import TemplateFault
from retool.data.template.thoughts import field_of, thoughts

if TYPE_CHECKING:
    from retool.data.render.renderer import Renderer
    from retool.data.render.rendering import Rendering

SWITCHES = ("enable_thinking", "thinking")  # of thinking, as templates name it
NAMED = 4  # ways out in a message, at most
# Rows of one kind of fault: trying every setting takes ten times as long as the row itself.
MOST_TRIED = 100
HISTORY = {
    "split": "data.multiturn.history=split (it makes a sample of every turn)",
    "last": "data.multiturn.history=last (it trains only the turns that stay)",
}
INLINE_OUTPUTS = {
    "mask": "data.multiturn.inline_outputs=mask (it trains what stands around the outputs)",
    "train": "data.multiturn.inline_outputs=train (it trains the outputs, too)",
}


class WayOut(NamedTuple):
    """Settings as they are written on the command line, and the rendering that they make."""

    said: str
    rendering: Rendering


def with_ways_out(
    error: TemplateFault, renderer: Renderer, conversation: Conversation
) -> TemplateFault:
    """The error with the settings that this row is fine with.

    Of many rows with one fault only the first are tried.
    """
    kind = kind_of(str(error))
    renderer.refused[kind] += 1
    if renderer.refused[kind] > MOST_TRIED:
        return TemplateFault(
            f"{error}; what works was looked for in the first {MOST_TRIED} rows like it."
        )
    ways = list(islice(_working(renderer, conversation), NAMED))
    if not ways:
        return TemplateFault(
            f"{error}; no other setting shows all of it: mend the row, or give a template that does "
            "(data.chat_template)."
        )
    return TemplateFault(f"{error}; what works for it: {' or '.join(ways)}.")


def _working(renderer: Renderer, conversation: Conversation) -> Iterator[str]:
    alone: set[str] = set()
    for way in _candidates(renderer, conversation):
        # Where a setting or splitting is enough by itself, both together are no news.
        if set(way.said.split(" with ")) & alone or not _works(way, renderer, conversation):
            continue
        alone.add(way.said)
        yield way.said


def _works(way: WayOut, renderer: Renderer, conversation: Conversation) -> bool:
    try:
        samples = renderer.variant(way.rendering).pieces_or_fault(conversation)
    except ValueError:
        return False
    return any(piece.trained for pieces in samples for piece in pieces)


def _candidates(renderer: Renderer, conversation: Conversation) -> Iterator[WayOut]:
    """The simplest first, and last what leaves something out."""
    now = renderer.rendering
    strict = now.history == "error"
    settings = list(_settings(renderer, conversation))
    if strict:
        yield from (WayOut(said, replace(now, history=name)) for name, said in HISTORY.items())
    yield from settings
    if strict:
        yield from (_and_split(way) for way in settings)
    said = [conversation.messages[i]["content"] for i in conversation.assistant_turns]
    if any(tag in text for text in said for tag in (OPENS, CLOSES)):
        for choice, words in INLINE_OUTPUTS.items():
            yield WayOut(words, replace(now, inline_outputs=choice))
    if now.chat_template != "hermes":
        yield WayOut("data.chat_template=hermes", replace(now, chat_template="hermes"))
    if _leaves_thoughts(now) and any(
        thoughts(conversation.messages[i]) for i in conversation.assistant_turns
    ):
        drop = WayOut("data.drop_reasoning=true", replace(now, drop_reasoning=True))
        yield drop
        if strict:
            yield _and_split(drop)


def _and_split(way: WayOut) -> WayOut:
    """The same, with every turn made a sample of its own."""
    return WayOut(f"{way.said} with {HISTORY['split']}", replace(way.rendering, history="split"))


def _settings(renderer: Renderer, conversation: Conversation) -> Iterator[WayOut]:
    """Settings that show more."""
    now = renderer.rendering
    answers = [conversation.messages[i] for i in conversation.assistant_turns]
    if _leaves_thoughts(now) and any(field_of(message) for message in answers):
        yield WayOut("data.reasoning_in_content=true", replace(now, reasoning_in_content=True))
    for switch in SWITCHES:
        by_row = switch == "enable_thinking" and conversation.enable_thinking is not None
        is_set = by_row or switch in now.template_kwargs
        if is_set or not re.search(rf"\b{switch}\b", renderer.source):
            continue
        for value in (True, False):
            said = f"data.apply_chat_template_kwargs.{switch}={str(value).lower()}"
            kwargs = {**now.template_kwargs, switch: value}
            yield WayOut(said, replace(now, template_kwargs=kwargs))


def _leaves_thoughts(rendering: Rendering) -> bool:
    """Whether nothing is said yet of what becomes of thoughts."""
    return not rendering.drop_reasoning and not rendering.reasoning_in_content
