"""Which tokens are trained: the mask of a conversation is decided here, and nowhere else.

1. `trained_messages`: the assistant's messages that the row doesn't switch off.
2. `cut`: the rendered text, cut at the edges of these turns. A piece is trained if it is such a
   turn, and stands there as the model would have written it (see the notes of `template.turns`).
3. `mask_of`: the tokens of a trained piece are trained, its end-of-turn token included.

As a target the first token of a sample has nothing before it: `retool.batch.pack` leaves it out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from retool.data.read.rows import Conversation
from retool.data.template.turns import Turn
from retool.data.tokens.encoder import Piece


def trained_messages(conversation: Conversation) -> list[int]:
    """Indices of the assistant's messages that `loss_mask` (or `weight`) doesn't switch off."""
    messages = conversation.messages
    return [i for i in conversation.assistant_turns if messages[i].get("loss_mask", 1)]


def cut(text: str, turns: Sequence[Turn], trained: Collection[int]) -> list[Piece]:
    """Cut `text` at the edges of every turn that stands in it unchanged.

    A turn is trained if its message is in `trained`.
    """
    pieces = []
    at = 0
    for turn in turns:
        place = turn.place(text)
        # The template rewrites this turn here: it is context, and not the model's own words.
        if place is None:
            continue
        begin, end = place
        assert begin >= at, "an assistant turn begins before the one ahead of it ends"
        pieces.append(Piece(text[at:begin]))
        pieces.append(Piece(turn.body, turn.message, turn.message in trained))
        at = end
    pieces.append(Piece(text[at:]))
    return [piece for piece in pieces if piece.text]


def mask_of(pieces: Sequence[Piece], ids: Sequence[Sequence[int]]) -> np.ndarray:
    """The mask of a sample, bool [n]: True where the token is trained. `ids` are those of pieces."""
    return np.repeat([piece.trained for piece in pieces], [len(part) for part in ids])
