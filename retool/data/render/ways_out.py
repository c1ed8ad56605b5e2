"""What to do about a row that a template can't show: each setting is tried on the row itself, and
named only if it works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from retool.data.read.refusals import kind_of
from retool.data.read.rows import Conversation
from retool.data.render.accounting import TemplateFault
from retool.data.render.reasoning import field_of, thoughts

if TYPE_CHECKING:
    from retool.data.render.renderer import Renderer

SWITCHES = ("enable_thinking", "thinking")  # the names that templates read
NAMED = 4
MOST_TRIED = (
    100  # rows of one kind of fault: trying every setting takes ten times as long as the row itself
)
HISTORY = {
    "split": "data.multiturn.history=split (it makes a sample of every turn)",
    "last": "data.multiturn.history=last (it trains only the turns that stay)",
}


class WayOut(NamedTuple):
    """Settings as they are written on the command line, what they change of the renderer, and the
    history they need.
    """

    said: str
    changes: dict[str, Any]
    history: str


def with_ways_out(
    error: TemplateFault, renderer: Renderer, conversation: Conversation, history: str
) -> TemplateFault:
    """The error with the settings that this row is fine with; of many rows with one fault only the
    first are tried.
    """
    kind = kind_of(str(error))
    renderer.refused[kind] += 1
    if renderer.refused[kind] > MOST_TRIED:
        return TemplateFault(
            f"{error}; what works was looked for in the first {MOST_TRIED} rows like it."
        )
    ways = list(islice(_working(renderer, conversation, history), NAMED))
    if not ways:
        return TemplateFault(
            f"{error}; no other setting shows all of it: mend the row, or give a template that does "
            "(data.chat_template)."
        )
    return TemplateFault(f"{error}; what works for it: {' or '.join(ways)}.")


def _working(renderer: Renderer, conversation: Conversation, history: str) -> Iterator[str]:
    alone: set[str] = set()
    for way in _candidates(renderer, conversation, history):
        # Where a setting or splitting is enough by itself, both together are no news.
        if set(way.said.split(" with ")) & alone or not _works(way, renderer, conversation):
            continue
        alone.add(way.said)
        yield way.said


def _works(way: WayOut, renderer: Renderer, conversation: Conversation) -> bool:
    try:
        samples = _changed(renderer, way.changes).pieces_or_fault(conversation, way.history)
    except ValueError:
        return False
    return any(piece.trained for pieces in samples for piece in pieces)


def _changed(renderer: Renderer, changes: dict[str, Any]) -> Renderer:
    """A renderer like this one but for some of its arguments; kept, for the next row.

    Raises ValueError as the constructor does.
    """
    if not changes:
        return renderer
    key = repr(sorted(changes.items()))
    if key not in renderer.variants:
        arguments = {
            "chat_template": renderer.chat_template,
            "template_kwargs": renderer.template_kwargs,
            "drop_reasoning": renderer.drop_reasoning,
            "reasoning_in_content": renderer.reasoning_in_content,
        }
        renderer.variants[key] = type(renderer)(renderer.tokenizer, **{**arguments, **changes})
    return renderer.variants[key]


def _candidates(renderer: Renderer, conversation: Conversation, history: str) -> Iterator[WayOut]:
    """The simplest first, and last what leaves something out."""
    settings = list(_settings(renderer, conversation))
    if history == "error":
        yield from (WayOut(said, {}, name) for name, said in HISTORY.items())
    yield from (WayOut(said, changes, history) for said, changes in settings)
    if history == "error":
        yield from (
            WayOut(f"{said} with {HISTORY['split']}", changes, "split")
            for said, changes in settings
        )
    if renderer.chat_template != "hermes":
        yield WayOut("data.chat_template=hermes", {"chat_template": "hermes"}, history)
    if _leaves_thoughts(renderer) and any(
        thoughts(conversation.messages[i]) for i in conversation.assistant_turns
    ):
        drop = {"drop_reasoning": True}
        yield WayOut("data.drop_reasoning=true", drop, history)
        if history == "error":
            yield WayOut(f"data.drop_reasoning=true with {HISTORY['split']}", drop, "split")


def _settings(
    renderer: Renderer, conversation: Conversation
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that show more."""
    answers = [conversation.messages[i] for i in conversation.assistant_turns]
    if _leaves_thoughts(renderer) and any(field_of(message) for message in answers):
        yield "data.reasoning_in_content=true", {"reasoning_in_content": True}
    for switch in SWITCHES:
        said = switch in renderer.template_kwargs or (
            switch == "enable_thinking" and conversation.enable_thinking is not None
        )
        if said or not re.search(rf"\b{switch}\b", renderer.source):
            continue
        for value in (True, False):
            kwargs = {**renderer.template_kwargs, switch: value}
            yield (
                f"data.apply_chat_template_kwargs.{switch}={str(value).lower()}",
                {"template_kwargs": kwargs},
            )


def _leaves_thoughts(renderer: Renderer) -> bool:
    """Whether nothing is said yet of what becomes of thoughts."""
    return not renderer.drop_reasoning and not renderer.reasoning_in_content
