"""Keeps control tokens that a row or a tool only mentions as text.

`<|im_end|>` in what somebody says ends no turn.

[Note: control tokens] A *control token* is an added token that the tokenizer calls special, that
the chat template writes, or that is a marker by its name (`<|…|>`, `<think>`, `<tool_call>`). Other
added tokens (runs of spaces, HTML tags) are vocabulary and stay what the tokenizer makes of them.
Only the template may write a control token. The text of one in a message, a call's arguments or a
tool's schema is *quoted*: it is tokenised as the letters that it consists of. There is one
exception, because inference makes it. What the assistant says itself may hold the tokens that a
model samples there as words: control tokens that aren't special (`<tool_call>`), and tags of
thoughts (`<think>`). In the arguments of a call they are quoted too.

[Note: masks] A rendered text doesn't tell who wrote what. So before the template sees a
conversation that holds the text of a control token, each is hidden: one private character stands
for it. The template strips, splits, escapes and joins as ever, turns are looked for in a text that
nobody but the template can have structured, and where the characters come out, there was data. That
the template gives the same text either way is checked for each render. A template may test how a
text begins or ends (Qwen3: `content.startswith('<tool_response>')`); where hiding changes its mind,
a token on the very edge of a text is left as it is, with a private character beside it that says
so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from retool.data.tokens.fast_tokenizer import encode_text

Span = tuple[int, int]
MARKER = re.compile(r"<[|｜].*[|｜]>|</?(think|tool_call|tool_response)>", re.DOTALL)
PRIVATE = range(0xF0000, 0x10FFFE)  # code points that no standard gives a meaning
PRIVATE_TEXT = re.compile("[\U000f0000-\U0010fffd]")


class UnplacedError(Exception):
    """A template shows a text otherwise when the control tokens in it are hidden.

    Their places aren't known then.
    """


def change_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys of mappings too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [change_strings(entry, change) for entry in value]
    if not isinstance(value, Mapping):
        return value
    changed = {}
    for key, entry in value.items():
        new_key = change(key) if isinstance(key, str) else key
        changed[new_key] = change_strings(entry, change)
    return changed


def holds(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether any text in `value` has a match, keys of mappings too."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(holds(key, pattern) or holds(entry, pattern) for key, entry in value.items())
    return isinstance(value, (list, tuple)) and any(holds(entry, pattern) for entry in value)


def _collect(value: Any, texts: list[str]) -> None:
    """Add every text in `value`, keys of mappings too."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _collect(entry, texts)
    elif isinstance(value, (dict, Mapping)):
        for key, entry in value.items():
            if isinstance(key, str):
                texts.append(key)
            _collect(entry, texts)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of `tokens` at each place, as tokenizers do; nothing where there is none."""
    # Alternatives in a regular expression are tried in order, and the first that fits wins.
    longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@dataclass(frozen=True)
class Masks:
    """One way to hide `tokens`: token k is the private character `base + k`.

    With `edges`, a token on the edge of what others than the assistant say stays, and a private
    character beside it, on the inner side, says that it is data.
    """

    tokens: tuple[str, ...]
    base: int
    edges: bool = False

    @cached_property
    def _places(self) -> re.Pattern[str]:
        hidden = f"[{chr(self.base)}-{chr(self.base + len(self.tokens) - 1)}]"
        known = any_of(self.tokens).pattern
        return re.compile(f"(?:{known}){self._after}|{self._before}(?:{known})|{hidden}")

    @property
    def _after(self) -> str:
        return chr(self.base + len(self.tokens))

    @property
    def _before(self) -> str:
        return chr(self.base + len(self.tokens) + 1)

    def hide(self, text: str, pattern: re.Pattern[str], on_edges: bool = False) -> str:
        """`text` with every match of `pattern` hidden.

        `on_edges`: it is a text whose edges a template may test.
        """
        first = len(text) - len(text.lstrip())
        last = len(text.rstrip())

        def one(found: re.Match[str]) -> str:
            if on_edges and self.edges and found.start() == first:
                return found[0] + self._after
            if on_edges and self.edges and found.end() == last:
                return self._before + found[0]
            return chr(self.base + self.tokens.index(found[0]))

        return pattern.sub(one, text)

    def show(self, masked: str) -> tuple[str, tuple[Span, ...]]:
        """The text itself, and where in it the hidden tokens stand."""
        parts: list[str] = []
        spans: list[Span] = []
        length = 0  # of the text so far
        at = 0  # in the masked text
        for found in self._places.finditer(masked):
            token = found[0].strip(self._after + self._before)
            if len(token) == 1 and self.base <= ord(token) < self.base + len(self.tokens):
                token = self.tokens[ord(token) - self.base]
            parts += [masked[at : found.start()], token]
            start = length + found.start() - at
            length = start + len(token)
            spans.append((start, length))
            at = found.end()
        return "".join([*parts, masked[at:]]), tuple(spans)

    def plain(self, value: Any) -> Any:
        """`value` with nothing hidden in any text of it."""
        return change_strings(value, lambda text: self.show(text)[0])

    def told(self, why: str) -> str:
        """An error's text with nothing hidden; `repr` may have escaped what is."""
        unescaped = re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), why)
        return self.show(unescaped)[0]


@dataclass(frozen=True)
class Controls:
    """The control tokens of a tokenizer with its template, as text.

    `own` are those that the assistant's words may hold as tokens.
    """

    tokens: tuple[str, ...]
    own: frozenset[str]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds every control token."""
        return any_of(self.tokens)

    @cached_property
    def _not_own(self) -> re.Pattern[str]:
        return any_of(set(self.tokens) - self.own)

    def spans(self, text: str) -> tuple[Span, ...]:
        """Where control tokens stand in a text that isn't the assistant's."""
        return tuple(found.span() for found in self.pattern.finditer(text))

    def quoted_in(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> bool:
        """Whether anything has to be hidden."""
        texts = list[str]()
        _collect([*messages, tools], texts)
        # One look at all of them, which finds more than there is at worst
        if self.pattern.search("\n".join(texts)) is None:
            return False
        for message in messages:
            for _, value, pattern in self._fields(message):
                if holds(value, pattern):
                    return True
        return bool(tools) and holds(tools, self.pattern)

    def _fields(self, message: Mapping[str, Any]) -> Iterator[tuple[str, Any, re.Pattern[str]]]:
        """(name, value, what to hide in it) of each field that holds data."""
        is_assistant = message.get("role") == "assistant"
        for name, value in message.items():
            if name == "role":
                continue
            own_words = is_assistant and name != "tool_calls"
            yield name, value, self._not_own if own_words else self.pattern

    def masks(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Iterator[Masks]:
        """The ways to hide control tokens in these messages and tools, the best first.

        ValueError: no character is left.
        """
        taken: set[int] = set()

        def note(text: str) -> str:
            taken.update(map(ord, PRIVATE_TEXT.findall(text)))
            return text

        change_strings([*map(dict, messages), tools], note)
        size = len(self.tokens) + 2  # one character a token, and two for edges
        for base in range(PRIVATE.start, PRIVATE.stop - size, size):
            if taken.isdisjoint(range(base, base + size)):
                yield Masks(self.tokens, base)
                yield Masks(self.tokens, base, edges=True)
                return
        raise ValueError(
            "its texts hold the tokenizer's control tokens and every private character of "
            "Unicode: take these out."
        )

    def hide(self, messages: Sequence[Mapping[str, Any]], masks: Masks) -> list[dict[str, Any]]:
        """The messages with every quoted control token hidden."""
        return [self._hide_message(message, masks) for message in messages]

    def _hide_message(self, message: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
        hidden = dict(message)
        on_edges = message.get("role") != "assistant"
        for name, value, pattern in self._fields(message):
            hidden[name] = change_strings(
                value, lambda text, pattern=pattern: masks.hide(text, pattern, on_edges)
            )
        return hidden

    def hide_tools(self, tools: Any, masks: Masks) -> Any:
        """The schemas with every control token hidden."""
        return change_strings(tools, lambda text: masks.hide(text, self.pattern))


def find_controls(
    tokenizer: Any, template: str, structure: str, ends: Sequence[str], thought: re.Pattern[str]
) -> Controls:
    """The control tokens of `tokenizer` with a template of this source.

    `structure` is text that the template writes around messages and before an answer: its tokens
    are never the assistant's own. End-of-turn tokens (`ends`) in the assistant's words aren't
    hidden either: they are looked at, and refused. `thought` finds tags of thoughts, which a model
    samples itself even where the tokenizer calls them special.
    """
    control: set[str] = set()
    own: set[str] = set()
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content
        if not text.strip():
            continue
        if not (token.special or text in template or MARKER.fullmatch(text)):
            continue  # vocabulary
        if not _is_read(tokenizer, text):
            continue  # it makes letters of this anyway, so nothing could be quoted
        control.add(text)
        is_word = not token.special or thought.fullmatch(text)
        if text in ends or (is_word and text not in structure):
            own.add(text)
    return Controls(tuple(sorted(control)), frozenset(own))


def _is_read(tokenizer: Any, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) in encode_text(tokenizer, token)
