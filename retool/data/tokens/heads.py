"""Tokens of the first messages, kept for reuse: rows of a data set often share their instructions
and tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from retool.data.tokens.fast_tokenizer import encode_text, plain_backend

KEPT = 256  # first messages


class Heads:
    """Keeps the tokens of texts up to the end-of-turn token `end`, so that each is made once.

    `probes` are texts to try a tokenizer with. Can be pickled.
    """

    def __init__(self, tokenizer: Any, end: str, probes: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.end = end
        self.probes = probes
        self.kept: dict[str, list[int]] = {}

    def taken_off(self, text: str) -> tuple[list[int], str]:
        """The tokens of the first message of a text, and the rest of it.

        All of the text is the rest where they can't be told apart, and once many are kept.
        """
        if not self._end_divides:
            return [], text
        head = text[: text.find(self.end) + len(self.end)]
        if head not in self.kept:
            if len(self.kept) >= KEPT or not head.endswith(self.end):
                return [], text
            self.kept[head] = encode_text(self.tokenizer, head)
        return self.kept[head], text[len(head) :]

    @cached_property
    def _end_divides(self) -> bool:
        """Whether the tokenizer begins anew behind the token, as if a text began there.

        A token that is found in the text as it is divides it before anything else is looked at. Then
        what follows depends on it only where the beginning of a text is treated otherwise.
        """
        if plain_backend(self.tokenizer) is None:
            return False
        added = self.tokenizer.added_tokens_decoder.values()
        holding_end = [token for token in added if self.end in token.content]
        if len(holding_end) != 1:  # a longer one might be found in its place
            return False
        (token,) = holding_end
        if token.normalized or token.lstrip or token.rstrip or token.single_word:
            return False
        behind = [encode_text(self.tokenizer, self.end + probe)[1:] for probe in self.probes]
        return behind == [encode_text(self.tokenizer, probe) for probe in self.probes]
