"""A tool's text cut to its limit of tokens, without tokenising more of a flood than is needed."""

from __future__ import annotations

from itertools import pairwise

from retool.data.tokens.encoder import Encoder

MARKER = "…[cut]…"
# Of these many characters for each allowed token …
SAFE_CHARACTERS_PER_TOKEN = 2  # a text fits in all likelihood
FLOOD_CHARACTERS_PER_TOKEN = 256  # a text surely doesn't
SAMPLE_CHARACTERS_PER_TOKEN = 6  # is the beginning that is tokenised to see whether a text does
KEPT_CHARACTERS_PER_TOKEN = 12  # is what is looked at of a text that doesn't


def cut_text(encoder: Encoder, text: str, limit: int, side: str) -> str:
    """`text` in at most `limit` tokens, the marker included (where that fits).

    What fits is kept as it is. Else `left` loses its beginning, `right` its end, and `middle` what
    lies between. It is cut between tokens, so no character is halved. The name of a control token
    in it counts as the text that it is.
    """
    text = _without_middle(encoder, text, limit, side)
    spans = _token_spans(encoder, text)
    if len(spans) <= limit:
        return text
    marker_tokens = len(encoder.data_ids(MARKER))
    marker_fits = marker_tokens <= limit
    marker = MARKER if marker_fits else ""
    room = limit - marker_tokens if marker_fits else limit
    # Ends: each round takes away at least one token, down to the marker alone.
    while True:
        head = {"left": 0, "right": room, "middle": (room + 1) // 2}[side]
        tail = room - head
        start = text[: spans[head - 1][1]] if head else ""
        end = text[spans[len(spans) - tail][0] :] if tail else ""
        shorter = start + marker + end
        # The cut text can tokenise otherwise than its parts
        excess = len(encoder.data_ids(shorter)) - limit
        if excess <= 0 or room == 0:
            return shorter
        room = max(room - excess, 0)


def _without_middle(encoder: Encoder, text: str, limit: int, side: str) -> str:
    """Both ends of a text that is far too long, and more of them than may be kept: to tokenise all
    of it would take long. A text that may fit comes back whole.
    """
    kept = KEPT_CHARACTERS_PER_TOKEN * limit
    if len(text) <= kept:
        return text
    # Tokenising megabytes that are cut anyway would hold all other trajectories up.
    if len(text) <= FLOOD_CHARACTERS_PER_TOKEN * limit:
        beginning = encoder.data_ids(text[: SAMPLE_CHARACTERS_PER_TOKEN * limit])
        # + 1: its last token may be one that the rest of the text would have made longer
        if len(beginning) <= limit + 1:
            return text
    head = {"left": 0, "right": kept, "middle": kept // 2}[side]
    tail = kept - head
    return text[:head] + MARKER + (text[-tail:] if tail else "")


def _token_spans(encoder: Encoder, text: str) -> list[tuple[int, int]]:
    """(start, end) characters of each token."""
    if encoder.tokenizer.is_fast:
        return encoder.data_offsets(text)
    # A slow tokenizer can't tell where its tokens stand: evenly, then
    count = len(encoder.data_ids(text))
    edges = [round(i * len(text) / max(count, 1)) for i in range(count + 1)]
    return list(pairwise(edges))
