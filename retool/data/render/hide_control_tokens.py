"""Conversations cut up with the control tokens in their texts hidden (see `control_tokens`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from retool.data.read.rows import Conversation
from retool.data.render.between_turns import HOLE
from retool.data.template.completeness import fault
from retool.data.template.turns import PLACEHOLDER, EndOfTurn
from retool.data.tokens.control_tokens import Controls, Masks, UnplacedError, any_of
from retool.data.tokens.encoder import Piece

Shown = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]


def cut_hidden(
    conversation: Conversation,
    controls: Controls,
    cut_up: Callable[[Conversation], list[list[Piece]]],
) -> list[list[Piece]]:
    """The pieces that `cut_up` makes of the conversation with quoted control tokens hidden.

    The places of these are noted in the pieces.

    Raises TemplateFault where the template shows them unlike other text.
    """
    messages = conversation.messages
    tools = conversation.tools
    if not controls.quoted_in(messages, tools):
        return cut_up(conversation)
    try:
        choices = list(controls.masks(messages, tools))
    except ValueError as error:
        raise conversation.error(str(error)) from error
    for masks in choices:
        hidden = controls.hide(messages, masks)
        hidden_tools = controls.hide_tools(tools, masks)
        try:
            found = cut_up(replace(conversation, messages=hidden, tools=hidden_tools, masks=masks))
        except UnplacedError:
            continue
        return [[_placed(piece, masks) for piece in pieces] for pieces in found]
    token = next(
        token
        for token in controls.tokens
        if token in json.dumps([messages, tools], ensure_ascii=False)
    )
    why = (
        f"the chat template shows a text that holds {token!r} in another way than other texts, so its "
        "place can't be found"
    )
    raise fault(conversation, why)


def _placed(piece: Piece, masks: Masks) -> Piece:
    text, quoted = masks.show(piece.text)
    return replace(piece, text=text, quoted=quoted)


def hidden_text(
    masks: Masks,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    show: Shown,
) -> str:
    """What `show` gives for messages with control tokens hidden.

    Raises UnplacedError where that is another text.
    """
    plain = show(masks.plain(list(messages)), masks.plain(tools))
    try:
        hidden = show(messages, tools)
    except ValueError as error:
        raise UnplacedError from error
    if masks.show(hidden)[0] != plain:
        raise UnplacedError
    return hidden


def structure_of(text: Callable[..., str], ends: EndOfTurn) -> str:
    """What a template writes around the messages of others, and first of all before an answer.

    `text` renders.
    """
    user = {"role": "user", "content": HOLE}
    assistant = {"role": "assistant", "content": PLACEHOLDER}
    found: list[str] = []
    with suppress(ValueError):  # a template may take no conversation like one of these
        found.append(text([user]))
        opening = text([user], generation_prompt=True).removeprefix(found[0])
        found += any_of(ends.added).findall(opening)[:1]
    for role in ("user", "tool"):
        with suppress(ValueError):
            found.append(
                text([user, assistant, {"role": role, "content": HOLE}]).rpartition(PLACEHOLDER)[2]
            )
    return "\n".join(found)
