"""A tokenizer's chat template, or another in its stead: messages in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import jinja2

from retool.data.read.content import SURROGATE
from retool.data.template.choose import chosen_template, end_of_hermes
from retool.data.template.direct import Asked, agrees, directly, officially
from retool.data.template.discover import (
    CONVERSATIONS,
    TOOL,
    CallForm,
    find_call_form,
    find_ends,
    find_header,
    shown_message,
)
from retool.data.template.time_and_memory import OutOfBounds, check_source, within_bounds


class ChatTemplate:
    """The template named by `chat_template` (`hermes`, a file; None: the tokenizer's own).

    It is given the arguments `kwargs`.

    `source` is its text where it isn't the tokenizer's own, `ends` the tokens that end a turn,
    `header` what it writes before an answer if it has no generation prompt. Raises ValueError where
    there is no template, or no end-of-turn token.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None, kwargs: Mapping[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.kwargs = kwargs
        self._direct = False  # until both ways were compared
        self.source: str | None = (
            chosen_template(chat_template, tokenizer) if chat_template is not None else None
        )
        if self.source is None and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: choose one with data.chat_template=hermes, or a file."
            )
        for source in own_sources(tokenizer) if self.source is None else [self.source]:
            check_source(source)
        try:
            self._look(chat_template)
        except OutOfBounds as error:
            raise ValueError(
                f"the chat template was stopped: {error}. {self._another(chat_template)}"
            ) from error

    def _look(self, chat_template: str | None) -> None:
        """Learn from probes how the template ends a turn, begins an answer and writes a call."""
        tokenizer = self.tokenizer
        added = frozenset(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip()
        )
        try:
            ends = find_ends(self._show_probe, added, tokenizer.eos_token)
        except ValueError as error:
            raise ValueError(
                f"{str(error).removesuffix('.')}. {self._another(chat_template)}"
            ) from error
        self.header = find_header(self._show_probe)
        self._form, self.ends = find_call_form(self._show_probe, ends)
        probes = [
            Asked([shown_message(message, self._form) for message in messages], *more)
            for messages in CONVERSATIONS
            for more in (([TOOL], self.kwargs, False), (None, self.kwargs, True))
        ]
        # transformers' own way of rendering is slow. Ours is taken only where both agree on every
        # probe.
        self._direct = within_bounds(lambda: agrees(tokenizer, self.source, probes))

    def show(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
        generation_prompt: bool,
    ) -> str:
        """The template's own text.

        Raises ValueError with what the template (or Jinja) complains of.
        """
        kwargs = (
            self.kwargs
            if enable_thinking is None
            else {**self.kwargs, "enable_thinking": enable_thinking}
        )
        try:
            return self._show(messages, tools, kwargs, generation_prompt, self._form)
        except OutOfBounds as error:
            raise ValueError(f"the chat template was stopped: {error}") from error

    def _show(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        generation_prompt: bool,
        form: CallForm,
    ) -> str:
        shown = [shown_message(message, form) for message in messages]
        asked = Asked(shown, tools, kwargs, generation_prompt)
        way = directly if self._direct else officially
        try:
            text = within_bounds(lambda: way(self.tokenizer, self.source, asked))
        except RecursionError:
            raise OutOfBounds("it calls itself without end") from None
        except MemoryError:
            raise OutOfBounds("it makes more text than there is memory for") from None
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return valid_text(text)

    def _show_probe(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
        with_tool: bool,
        form: CallForm,
    ) -> str:
        """A small conversation of ours; with a tool too where the template is made for tools alone."""
        if not with_tool:
            with suppress(ValueError):
                return self._show(messages, None, self.kwargs, generation_prompt, form)
        return self._show(messages, [TOOL], self.kwargs, generation_prompt, form)

    def _another(self, chat_template: str | None) -> str:
        if chat_template != "hermes" and end_of_hermes(self.tokenizer) is not None:
            return "Use another one: data.chat_template=hermes fits this tokenizer, or give a file."
        return (
            "Add a token to this tokenizer that ends a turn, and use a template that writes it "
            "(data.chat_template: a file)."
        )


def own_sources(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's own templates: one, or several by name."""
    own = tokenizer.chat_template
    return [str(text) for text in own.values()] if isinstance(own, Mapping) else [str(own)]


def valid_text(text: str) -> str:
    """The text. Raises ValueError where it isn't Unicode."""
    if SURROGATE.search(text):
        raise ValueError(
            "the text isn't valid Unicode (bytes that aren't UTF-8, or half of a surrogate pair)."
        )
    return text
