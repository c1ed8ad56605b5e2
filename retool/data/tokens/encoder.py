"""Pieces of a render → token ids. No other place tokenises text for a model.

[Note: anchors] Some tokenizers take the beginning of whatever text they are given for that of a
word, and put a space there: SentencePiece's do, some after every special token too. A piece isn't
the beginning of a text, so a few characters are tokenised before it, and their tokens dropped
again: its *anchor*. What follows a turn is anchored by the end-of-turn token, as it stands in one
pass over a prompt. A turn itself follows the generation prompt, and is anchored by whatever lets
its tokens decode to the very text of the turn; no space may be trained that nobody wrote.
"""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from retool.data.tokens.bounds import failures_told
from retool.data.tokens.control_tokens import Controls, Span
from retool.data.tokens.fast_tokenizer import (
    decode_ids,
    encode_text,
    encode_texts,
    plain_backend,
    token_offsets,
)
from retool.data.tokens.heads import Heads

TEXT_ANCHORS = ("\n", ".", ";")  # no letters: a word could go on in what follows
PROBES = ("a", " a", "a b", "\na", "Hello", "12", "<a>")
WAY_OUT = (
    "Use a tokenizer that gives text back as it was: byte-level BPE, or SentencePiece that neither "
    "lower-cases nor drops characters."
)


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered text that is tokenised by itself.

    It is a whole assistant turn (`turn`: the index of its message), or what lies between turns.
    `quoted`: where in it control tokens stand as somebody's text, not as the template's.
    """

    text: str
    turn: int | None = None
    trained: bool = False
    quoted: tuple[Span, ...] = ()


class Encoder:
    """Tokenises pieces with a tokenizer, of whose end-of-turn tokens one is `end`.

    Can be pickled.
    """

    def __init__(self, tokenizer: Any, end: str, controls: Controls) -> None:
        self.tokenizer = tokenizer
        self.end = end
        self.controls = controls
        self._heads = Heads(tokenizer, end, PROBES)

    def encode(self, pieces: Sequence[Piece], begins: bool = True) -> list[list[int]]:
        """Token ids of consecutive pieces of a text, each tokenised by itself.

        Only the first begins the text, if `begins`.
        """
        if not pieces:
            return []
        anchors = [self._anchor(piece) for piece in pieces]
        if begins:
            anchors[0] = ""
        texts = [anchor + piece.text for anchor, piece in zip(anchors, pieces, strict=True)]
        head, texts[0] = self._heads.taken_off(texts[0]) if begins else ([], texts[0])
        if len(texts) == 1:
            ids = [encode_text(self.tokenizer, texts[0])]
        else:
            ids = encode_texts(self.tokenizer, texts)
        ids[0] = [*head, *ids[0]]
        return [self._own_ids(*entry) for entry in zip(pieces, anchors, ids, strict=True)]

    def _own_ids(self, piece: Piece, anchor: str, ids: list[int]) -> list[int]:
        """The tokens of a piece, given those of its text behind its anchor."""
        if piece.quoted:
            return [token for token, _ in self._tokens(piece, anchor)]
        if not anchor:
            return ids
        found = self._without_anchor(ids, anchor)
        if found is not None:
            return found
        return [token for token, _ in self._stretch(piece.text, anchor)]

    def offsets(self, piece: Piece, begins: bool = False) -> list[Span]:
        """(start, end) characters of each token of a piece, to show them.

        One stretch where the tokenizer can't tell.
        """
        if not self.tokenizer.is_fast:
            return [(0, len(piece.text))]
        anchor = "" if begins else self._anchor(piece)
        if piece.quoted:
            return [span for _, span in self._tokens(piece, anchor)]
        if anchor:
            return [span for _, span in self._stretch(piece.text, anchor)]
        return token_offsets(self.tokenizer, piece.text)

    def data_ids(self, text: str) -> list[int]:
        """Token ids of a text from data, by itself: control tokens in it are text."""
        spans = self.controls.spans(text)
        if not spans:
            return encode_text(self.tokenizer, text)
        return [token for token, _ in self._tokens(Piece(text, quoted=spans), "")]

    def data_offsets(self, text: str) -> list[Span]:
        """(start, end) characters of each of those tokens. Only fast tokenizers can tell."""
        spans = self.controls.spans(text)
        if not spans:
            return token_offsets(self.tokenizer, text)
        return [span for _, span in self._tokens(Piece(text, quoted=spans), "")]

    # --- giving back ---

    def said(self, ids: Sequence[int]) -> str:
        """The text of tokens that stand amid others.

        Where a text begins, a decoder may take off a space.
        """
        before = decode_ids(self.tokenizer, self._some_text)
        whole = decode_ids(self.tokenizer, [*self._some_text, *ids])
        return whole[len(before) :] if whole.startswith(before) else decode_ids(self.tokenizer, ids)

    @cached_property
    def unknown(self) -> int | None:
        """The token for characters that the vocabulary lacks."""
        return self.tokenizer.unk_token_id

    @cached_property
    def _some_text(self) -> list[int]:
        return encode_text(self.tokenizer, "a")

    def check(self, piece: Piece, ids: Sequence[int]) -> None:
        """Raise ValueError unless the tokens of a piece decode to its text.

        Unicode's compatibility forms may be unified.
        """
        said = self.said(ids)
        if said == piece.text or _unified(said) == _unified(piece.text):
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(said, piece.text, strict=False)) if a != b),
            min(len(said), len(piece.text)),
        )
        where = f"message {piece.turn}: " if piece.turn is not None else ""
        raise ValueError(
            f"{where}the tokenizer doesn't give the text back: {piece.text[at : at + 30]!r} has become "
            f"{said[at : at + 30]!r}. {WAY_OUT}"
        )

    # --- anchors ---

    def _anchor(self, piece: Piece) -> str:
        return self._in_text if piece.turn is not None else self._after_end

    @cached_property
    def _after_end(self) -> str:
        """What to put before text that follows an end of turn."""
        plain, anchored = encode_texts(self.tokenizer, ["a", self.end + "a"])
        return self.end if plain != anchored[1:] else ""

    @cached_property
    def _in_text(self) -> str:
        """What to put before a turn: of all choices the first that gives most probes back."""
        choices = dict.fromkeys((self._after_end, "", self.end, *TEXT_ANCHORS))
        return max(choices, key=self._given_back)

    def _given_back(self, anchor: str) -> int:
        """How many probes behind this anchor decode to themselves."""
        count = 0
        for probe in PROBES:
            ids = self._without_anchor(encode_text(self.tokenizer, anchor + probe), anchor)
            count += ids is not None and self.said(ids) == probe
        return count

    @cached_property
    def _anchor_ids(self) -> dict[str, list[int]]:
        return {
            anchor: encode_text(self.tokenizer, anchor) for anchor in ("", self.end, *TEXT_ANCHORS)
        }

    def _without_anchor(self, ids: list[int], anchor: str) -> list[int] | None:
        """The tokens after those of the anchor; None where it has merged with what follows."""
        before = self._anchor_ids[anchor]
        return ids[len(before) :] if ids[: len(before)] == before else None

    # --- text that isn't what the tokenizer takes it for ---

    def _stretch(self, text: str, anchor: str, backend: Any = None) -> list[tuple[int, Span]]:
        """(token, characters) of a stretch of text behind its anchor.

        Behind another one where that merges with it.
        """
        for choice in dict.fromkeys((anchor, *(TEXT_ANCHORS if anchor else ()))):
            ids, spans = self._raw(choice + text, backend)
            before = self._raw(choice, backend)[0]
            if ids[: len(before)] == before:
                n = len(choice)
                moved = [
                    (max(start - n, 0), max(end - n, 0)) for start, end in spans[len(before) :]
                ]
                return list(zip(ids[len(before) :], moved, strict=True))
        raise ValueError(
            f"no character can stand before {text[:30]!r} without merging with it in this tokenizer. "
            f"{WAY_OUT}"
        )

    def _raw(self, text: str, backend: Any) -> tuple[list[int], list[Span]]:
        if backend is not None:
            with failures_told():
                found = backend.encode(text, add_special_tokens=False)
            return found.ids, found.offsets
        ids = encode_text(self.tokenizer, text)
        if not self.tokenizer.is_fast:
            return ids, [(0, len(text))] * len(ids)
        return ids, token_offsets(self.tokenizer, text)

    def _tokens(self, piece: Piece, anchor: str) -> Iterator[tuple[int, Span]]:
        """(token, characters) of a piece in which control tokens are quoted.

        Where the template wrote a control token, the tokenizer begins anew; so each stretch of text
        between two of them is tokenised by itself, as letters where something in it is quoted.
        """
        for start, end in self._cut(piece):
            quoted = [(a - start, b - start) for a, b in piece.quoted if start <= a < end]
            text = piece.text[start:end]
            if quoted:
                found = self._letters(text, quoted, self._in_text if start else anchor)
            else:
                found = self._stretch(text, "" if start else anchor)
            yield from ((token, (start + a, start + b)) for token, (a, b) in found)

    def _cut(self, piece: Piece) -> list[Span]:
        """The stretches of a piece that are tokenised by themselves.

        They lie around what is quoted, up to the control tokens that aren't, and between these.
        """
        text = piece.text
        for start, end in piece.quoted:
            text = text[:start] + "\0" * (end - start) + text[end:]
        live = [
            self._with_space(found.group(), found.span(), text)
            for found in self.controls.pattern.finditer(text)
        ]
        edges = {0, len(text)}
        for start, end in piece.quoted:
            edges.add(max((b for _, b in live if b <= start), default=0))
            edges.add(min((a for a, _ in live if a >= end), default=len(text)))
        cuts = sorted(edges)
        return [(a, b) for a, b in pairwise(cuts) if a < b]

    @cached_property
    def _takes_space(self) -> dict[str, tuple[bool, bool]]:
        added = self.tokenizer.added_tokens_decoder.values()
        return {token.content: (token.lstrip, token.rstrip) for token in added}

    def _with_space(self, token: str, span: Span, text: str) -> Span:
        """Where a control token is, with the white space around it that it takes in."""
        start, end = span
        left, right = self._takes_space.get(token, (False, False))
        if left:
            start = len(text[:start].rstrip())
        if right:
            end = len(text) - len(text[end:].lstrip())
        return start, end

    def _letters(self, text: str, quoted: Sequence[Span], anchor: str) -> list[tuple[int, Span]]:
        """(token, characters) of a text in which nothing is a control token."""
        if self._spelling is not None:
            found = self._stretch(text, anchor, self._spelling)
            if self._is_spelt(found):
                return found
        # A tokenizer that can't leave them unread: it reads the two halves of each.
        cuts = [0, *((start + end) // 2 for start, end in quoted), len(text)]
        halves: list[tuple[int, Span]] = []
        for a, b in pairwise(cuts):
            if a < b:
                part = self._stretch(text[a:b], self._in_text if a else anchor)
                halves += [(token, (a + start, a + end)) for token, (start, end) in part]
        if not self._is_spelt(halves):
            raise ValueError(
                f"this tokenizer can't write {text[slice(*quoted[0])]!r} as text: take it out."
            )
        return halves

    def _is_spelt(self, found: Sequence[tuple[int, Span]]) -> bool:
        """Whether no control token is among these.

        (A vocabulary may hold the text of one as a word.)
        """
        return self._control_ids.isdisjoint(token for token, _ in found)

    @cached_property
    def _spelling(self) -> Any:
        """A copy of the tokenizer's backend that reads no control token.

        None where there is no backend that does it all.
        """
        from tokenizers import AddedToken

        backend = plain_backend(self.tokenizer)
        if backend is None:
            return None
        spelling = copy.deepcopy(backend)
        added = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        words = [token for token in self.controls.tokens if not added[token].special]
        spelling.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in words]
        )
        spelling.encode_special_tokens = True
        return spelling

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        # The unknown token may come of any character that the vocabulary lacks.
        backend = plain_backend(self.tokenizer)
        unknown = {self.tokenizer.unk_token, getattr(backend and backend.model, "unk_token", None)}
        return frozenset(
            int(self.tokenizer.convert_tokens_to_ids(token))
            for token in self.controls.tokens
            if token not in unknown
        )


def _unified(text: str) -> str:
    return unicodedata.normalize("NFKC", text)
