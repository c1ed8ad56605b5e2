"""A conversation → pieces of text, of which each is tokenised by itself.

[Note: pieces] A conversation is rendered once, as text. The text is cut at the edges of the
assistant's turns and every piece is tokenised by itself, because that is how inference makes the
stream: a prompt is tokenised, the model samples a turn, what follows up to the next generation
prompt is tokenised, and so on. A tokenizer run over the whole text could merge across an edge (a
turn that begins with a newline, after a generation prompt that ends with one) into a token that the
model can never be asked to produce.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retool.data.read.rows import Conversation
from retool.data.render.hide_control_tokens import cut_hidden, hidden_text
from retool.data.render.inline_outputs import outputs_apart
from retool.data.render.mask import cut, trained_messages
from retool.data.render.rendering import Rendering
from retool.data.template.completeness import (
    TemplateFault,
    check_contexts,
    check_results,
    check_tools,
    fault,
)
from retool.data.template.one_render import turns_in
from retool.data.template.thoughts import settle_thoughts
from retool.data.template.turns import EndOfTurn, Turn, TurnFinder
from retool.data.tokens.control_tokens import Controls
from retool.data.tokens.encoder import Piece

Messages = Sequence[Mapping[str, Any]]
# (messages, tools, enable_thinking, with generation prompt) -> text
Text = Callable[[Messages, Messages | None, bool | None, bool], str]


@dataclass(frozen=True)
class PieceMaker:
    """Cuts conversations into pieces, and checks that the template shows all that they say.

    `text` renders with a template whose source is `source`. `ends` and `header` are what it writes
    at the end and at the beginning of an answer (see `TurnFinder`). `local`: it shows each message
    by itself (see `one_render`).
    """

    text: Text
    source: str
    ends: EndOfTurn
    header: str
    controls: Controls
    rendering: Rendering
    local: bool

    def of_samples(self, conversation: Conversation) -> list[list[Piece]]:
        """The pieces of each sample: one, or one a trained turn when history had to be split.

        Raises RowError (a TemplateFault, where another template or setting may help) for everything
        that can't be rendered beyond doubt.
        """
        rendering = self.rendering
        settled = settle_thoughts(
            conversation, rendering.drop_reasoning, rendering.reasoning_in_content
        )
        samples = cut_hidden(settled, self.controls, self._samples)
        return [outputs_apart(settled, pieces, rendering.inline_outputs) for pieces in samples]

    def of_prompt(self, conversation: Conversation) -> list[Piece]:
        """The pieces of a prompt, generation prompt included. Raises RowError."""
        (pieces,) = cut_hidden(conversation, self.controls, self._prompt)
        return pieces

    def _samples(self, conversation: Conversation) -> list[list[Piece]]:
        trained = trained_messages(conversation)
        turns = self._turns(conversation, trained)
        text = self._whole(conversation, turns)
        self._check_tools(conversation, turns)
        samples = [turn for turn in turns if turn.message in trained]
        rewritten = [turn for turn in samples if turn.place(text) is None]
        # The usual case: every turn stands in the whole text as the model wrote it, and one sample
        # has them all.
        if not rewritten or self.rendering.history == "last":
            self._check_contexts(conversation, text, len(conversation.messages))
            return [cut(text, turns, trained)]
        if self.rendering.history == "error":
            raise fault(
                conversation,
                "the chat template shows this turn differently once later messages exist, so "
                "training the whole conversation would train what the model never sees",
                rewritten[0].message,
            )
        # Otherwise a sample for each turn, with the context that the model would have seen then.
        for turn in samples:
            self._check_contexts(conversation, turn.whole, turn.message)
        return [cut(turn.whole, turns, {turn.message}) for turn in samples]

    def _prompt(self, conversation: Conversation) -> list[list[Piece]]:
        turns = self._turns(conversation, ())
        text = self._text_of(conversation, conversation.messages, True)
        self._check_contexts(conversation, text, len(conversation.messages))
        self._check_tools(conversation, turns)
        return [cut(text, turns, ())]

    def _text_of(
        self, conversation: Conversation, messages: Messages, generation_prompt: bool
    ) -> str:
        """The text of the first messages of a conversation. Raises TemplateFault."""

        def show(messages: Messages, tools: Messages | None) -> str:
            return self.text(messages, tools, conversation.enable_thinking, generation_prompt)

        try:
            if conversation.masks is not None:
                return hidden_text(conversation.masks, messages, conversation.tools, show)
            return show(messages, conversation.tools)
        except ValueError as error:
            turn = len(messages) - 1 if len(messages) < len(conversation.messages) else None
            raise fault(conversation, str(error).removesuffix("."), turn) from error

    def _turns(self, conversation: Conversation, trained: Collection[int]) -> list[Turn]:
        def show(messages: Messages, generation_prompt: bool) -> str:
            return self._text_of(conversation, messages, generation_prompt)

        finder = TurnFinder(conversation, show, self.ends, self.header)
        if not self.local:
            return finder.turns(trained)
        try:
            text = show(conversation.messages, False)
        except TemplateFault:  # two renders a turn tell which message it refuses
            return finder.turns(trained)
        found = turns_in(finder, text, trained)
        return finder.turns(trained) if found is None else found

    def _whole(self, conversation: Conversation, turns: Sequence[Turn]) -> str:
        """The text of the whole conversation.

        If a turn of the assistant's is the last, what stands before it is what inference shows.
        """
        last = len(conversation.messages) - 1
        if turns and turns[-1].message == last:
            return turns[-1].whole
        return self._text_of(conversation, conversation.messages, False)

    def _check_contexts(self, conversation: Conversation, text: str, end: int) -> None:
        """What others than the assistant say before message `end` must be in the text."""
        turns = conversation.assistant_turns
        check_contexts(conversation, text, [i for i in range(end) if i not in turns])

    def _check_tools(self, conversation: Conversation, turns: Sequence[Turn]) -> None:
        check_results(conversation, self.source)
        answers = conversation.assistant_turns
        opening = conversation.messages[: answers[0]] if answers else conversation.messages
        rendered = conversation.masks is None and turns and turns[0].message == answers[0]

        def show(tools: Messages | None) -> str:
            if tools and rendered:
                return turns[0].prompt
            return self.text(opening, tools, conversation.enable_thinking, True)

        check_tools(conversation, opening, show)
