"""Samples to look at: the text of each token, and who wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from retool.data.read.rows import Conversation
from retool.data.render.renderer import Renderer
from retool.data.template.time_and_memory import bounded
from retool.data.tokenise import LengthLimit
from retool.data.tokens.control_tokens import PRIVATE_TEXT
from retool.data.tokens.encoder import Piece

KINDS = ("trained", "context", "tool", "template", "masked")
FIRST_MARK = "\U00100000"
MOST_MARKED = 1_000
MARKS = re.compile(f"([{FIRST_MARK}-{chr(ord(FIRST_MARK) + MOST_MARKED)}])")


@dataclass(frozen=True)
class Shown:
    """One sample to look at: its tokens as (text, index into KINDS).

    `key` orders samples at random, the same in every run.
    """

    key: str
    file: str
    row: int
    tokens: list[tuple[str, int]]
    length: int
    trained: int
    turns: int
    calls: int


def sample_pieces(
    renderer: Renderer, conversation: Conversation, prompts: bool
) -> list[list[Piece]]:
    """The pieces of every sample; of an RL prompt its one render, generation prompt included."""
    with bounded():  # once for all that is rendered
        return [renderer.prompt_pieces(conversation)] if prompts else renderer.pieces(conversation)


def shown_sample(
    key: str,
    conversation: Conversation,
    renderer: Renderer,
    prompts: bool,
    limit: LengthLimit,
) -> Shown:
    """The sample of a row (the last, if it has several), after truncation.

    One that would be dropped is shown whole.
    """
    pieces = sample_pieces(renderer, conversation, prompts)[-1]
    colours = colour(pieces, renderer, conversation, prompts)
    tokens = _coloured_tokens(pieces, renderer, colours)
    whole = renderer.tokenise(pieces)
    sample = limit.cut(whole) or whole
    if len(tokens) == len(whole):
        too_many = len(whole) - len(sample)
        tokens = tokens[: len(sample)] if limit.truncation == "right" else tokens[too_many:]
    return Shown(
        key=key,
        file=conversation.file,
        row=conversation.row,
        tokens=tokens,
        length=len(sample),
        trained=sample.trained,
        turns=len(conversation.assistant_turns),
        calls=sum(len(message.get("tool_calls", [])) for message in conversation.messages),
    )


def _coloured_tokens(
    pieces: Sequence[Piece], renderer: Renderer, colours: bytearray
) -> list[tuple[str, int]]:
    """(text, index into KINDS) of each token."""
    tokens: list[tuple[str, int]] = []
    piece_start = 0
    for piece in pieces:
        shown_to = 0
        # A character of several tokens is shown with the first of them.
        for _, end in renderer.encoder.offsets(piece, begins=piece_start == 0):
            first = min(shown_to, len(piece.text) - 1)
            tokens.append((piece.text[shown_to:end], colours[piece_start + first]))
            shown_to = max(shown_to, end)
        piece_start += len(piece.text)
    return tokens


def colour(
    pieces: Sequence[Piece], renderer: Renderer, conversation: Conversation, prompts: bool
) -> bytearray:
    """For each character of the text the index of its kind.

    What messages say is theirs, the rest is the template's.
    """
    text = "".join(piece.text for piece in pieces)
    colours = bytearray([KINDS.index("template")]) * len(text)

    def paint(start: int, end: int, kind: str) -> None:
        colours[start:end] = bytes([KINDS.index(kind)]) * (end - start)

    places = _marked_places(text, renderer, conversation, prompts)
    for message, (start, end) in places or _found_places(text, conversation):
        is_result = conversation.messages[message]["role"] == "tool"
        paint(start, end, "tool" if is_result else "context")
    at = 0
    for piece in pieces:
        if piece.turn is not None:
            paint(at, at + len(piece.text), "trained" if piece.trained else "masked")
        at += len(piece.text)
    return colours


def _marked_places(
    text: str, renderer: Renderer, conversation: Conversation, prompts: bool
) -> list[tuple[int, tuple[int, int]]]:
    """(message, where its words stand), found with marks; nothing where these change the text.

    In a second render a private character of its own stands before and after each message's words.
    """
    said = [message["content"] for message in conversation.messages]
    first_mark = ord(FIRST_MARK)
    if PRIVATE_TEXT.search("".join(said)) or len(said) > MOST_MARKED:
        return []
    marked = [
        message
        if message["role"] == "assistant"
        else {**message, "content": _marked(message["content"], chr(first_mark + i))}
        for i, message in enumerate(conversation.messages)
    ]
    try:
        pieces = sample_pieces(renderer, replace(conversation, messages=marked), prompts)[-1]
    except ValueError:
        return []
    parts = MARKS.split("".join(piece.text for piece in pieces))  # text, mark, text, mark, …, text
    if "".join(parts[::2]) != text:
        return []
    places: list[tuple[int, tuple[int, int]]] = []
    opened: dict[str, int] = {}
    at = 0
    for words, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
        at += len(words)
        if mark and mark in opened:
            places.append((ord(mark) - first_mark, (opened.pop(mark), at)))
        elif mark:
            opened[mark] = at
    return places


def _marked(text: str, mark: str) -> str:
    """The text with a mark on each side of its words.

    White space stays outside, for a template to strip.
    """
    words = text.strip()
    return text.replace(words, mark + words + mark, 1) if words else text


def _found_places(text: str, conversation: Conversation) -> list[tuple[int, tuple[int, int]]]:
    """(message, where its words stand), looked for in order.

    That can be mistaken where the template says the same before.
    """
    places: list[tuple[int, tuple[int, int]]] = []
    at = 0
    for i, message in enumerate(conversation.messages):
        said = message["content"].strip()
        found = text.find(said, at) if said and message["role"] != "assistant" else -1
        if found >= 0:
            at = found + len(said)
            places.append((i, (found, at)))
    return places
