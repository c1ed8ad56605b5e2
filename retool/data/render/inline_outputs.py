"""Outputs of programs that stand in the middle of an assistant's message.

ReTool (arXiv 2504.11536) writes `<code>…</code>`, and its interpreter answers between two tags in
the same message. A model never writes these words: in a rollout sampling stops behind `</code>`, and
the output is put there. Trained on them, it would learn to make up what its programs print. A row
holds them in the assistant's text all the same, so somebody has to say whose words they are:
`data.multiturn.inline_outputs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from retool.data.read.rows import Conversation
from retool.data.template.completeness import fault
from retool.data.tokens.encoder import Piece

CODE_ENDS = "</code>"
OPENS = "<interpreter>"
CLOSES = "</interpreter>"
# White space behind the program, and a line's end behind the output, come with the output
OUTPUT = re.compile(rf"(?:(?<={CODE_ENDS})\s+|\n)?{OPENS}(?s:.*?){CLOSES}\n?")
AMID_TURN = re.compile(rf"{CODE_ENDS}\s*{OPENS}")


def outputs_apart(conversation: Conversation, pieces: Sequence[Piece], choice: str) -> list[Piece]:
    """The pieces of a sample, with outputs amid trained turns as pieces that aren't trained.

    `choice` is `Rendering.inline_outputs`. Raises TemplateFault where it is `error` and there are
    such outputs, and where a tag lacks its counterpart, so that nobody knows where one ends.
    """
    found: list[Piece] = []
    for piece in pieces:
        if not piece.trained or (OPENS not in piece.text and CLOSES not in piece.text):
            found.append(piece)
        elif choice == "mask":
            _require_pairs(conversation, piece)
            found += _cut(piece)
        elif choice == "error" and AMID_TURN.search(piece.text):
            why = (
                f"the assistant's text holds what a program printed ({OPENS} behind {CODE_ENDS}), and "
                "the model doesn't write that"
            )
            raise fault(conversation, why, piece.turn)
        else:
            found.append(piece)
    return found


def _require_pairs(conversation: Conversation, piece: Piece) -> None:
    # Of two that open before one closes, the first may be a word of the program
    rest = OUTPUT.sub(lambda output: OPENS * (output[0].count(OPENS) - 1), piece.text)
    tag = next((tag for tag in (OPENS, CLOSES) if tag in rest), None)
    if tag is not None:
        why = f"a {tag} lacks its counterpart, so it can't be told what the program printed"
        raise fault(conversation, why, piece.turn)


def _cut(piece: Piece) -> Iterator[Piece]:
    """A trained turn as the parts that the model writes, and the outputs between."""
    at = 0
    for output in OUTPUT.finditer(piece.text):
        yield from _part(piece, at, output.start(), trained=True)
        yield from _part(piece, output.start(), output.end(), trained=False)
        at = output.end()
    yield from _part(piece, at, len(piece.text), trained=True)


def _part(piece: Piece, start: int, end: int, trained: bool) -> Iterator[Piece]:
    """These characters of a piece; nothing where there are none."""
    if start == end:
        return
    quoted = tuple((a - start, b - start) for a, b in piece.quoted if start <= a and b <= end)
    yield replace(piece, text=piece.text[start:end], trained=trained, quoted=quoted)
