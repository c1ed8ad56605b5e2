"""The one renderer: every token that training, rollout and evaluation feed a model, and which of
them the model itself would write.

[Note: pieces] A conversation is rendered once, as text. The text is cut at the edges of the
assistant's turns and every piece is tokenised by itself, because that is how inference makes the
stream: a prompt is tokenised, the model samples a turn, the glue up to the next generation prompt
is tokenised, and so on. A tokenizer run over the whole text could merge across an edge (a turn that
begins with a newline, after a generation prompt that ends with one) into a token that the model can
never be asked to produce.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from retool.batch import Sample
from retool.data.read.files import RowError
from retool.data.read.quoting import Controls, find_controls
from retool.data.read.rows import Conversation
from retool.data.render.accounting import (
    TemplateFault,
    check_contexts,
    check_results,
    check_tools,
    fault,
)
from retool.data.render.chat_template import ChatTemplate
from retool.data.render.encoder import Encoder
from retool.data.render.glue import Glue, Setting
from retool.data.render.hiding import cut_hidden, hidden_text, structure_of
from retool.data.render.reasoning import TAG, settle_thoughts, thoughts
from retool.data.render.templates import load_tokenizer, other_tokens, shows_contents_as_they_are
from retool.data.render.turns import Piece, Turn, TurnFinder, cut
from retool.data.render.ways_out import with_ways_out

HISTORIES = ("error", "last", "split")
__all__ = ["HISTORIES", "Piece", "Renderer", "load_tokenizer", "other_tokens"]

ROWS_A_CHECK = 16  # decoding a row costs about a twentieth of making it


class Renderer:
    """Renders conversations with a tokenizer and its chat template (or `chat_template`: `hermes` or
    a file).

    `template_kwargs` are passed to the template. `drop_reasoning` leaves out what assistants think,
    `reasoning_in_content` writes it as <think>…</think> at the beginning of the content. Raises
    ValueError where there is no template, or no end-of-turn token. Can be pickled, so that worker
    processes share one.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        drop_reasoning: bool = False,
        reasoning_in_content: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template_kwargs = dict(template_kwargs or {})
        self.drop_reasoning = drop_reasoning
        self.reasoning_in_content = reasoning_in_content
        self._template = ChatTemplate(tokenizer, chat_template, self.template_kwargs)
        self.template: str | None = self._template.source
        self.ends = self._template.ends
        self.variants: dict[str, Renderer] = {}  # made by `ways_out`
        self.refused: Counter[str] = Counter()  # counted by it

    # -- text
    # ---------------------------------------------------------------------------------------------------------

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The template's own text.

        Raises ValueError with what the template (or Jinja) complains of.
        """
        return self._template.show(messages, tools, enable_thinking, generation_prompt)

    def _conversation_text(
        self,
        conversation: Conversation,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
    ) -> str:
        def show(
            messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
        ) -> str:
            return self.text(messages, tools, conversation.enable_thinking, generation_prompt)

        try:
            if conversation.masks is not None:
                return hidden_text(conversation.masks, messages, conversation.tools, show)
            return show(messages, conversation.tools)
        except ValueError as error:
            turn = len(messages) - 1 if len(messages) < len(conversation.messages) else None
            raise fault(conversation, str(error).removesuffix("."), turn) from error

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn, for the sampler to stop at."""
        return tuple(int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.ends.known)

    @cached_property
    def reasoning(self) -> Literal["none", "tagged", "opened"]:
        """Whether the template knows <think> … </think>, and whether its generation prompt already
        opens it.
        """
        if "</think>" not in self.source:
            return "none"
        prompt = self.text([{"role": "user", "content": "Question"}], generation_prompt=True)
        return "opened" if prompt.rstrip().endswith("<think>") else "tagged"

    # -- pieces
    # -------------------------------------------------------------------------------------------------------

    def pieces(self, conversation: Conversation, history: str = "error") -> list[list[Piece]]:
        """The pieces of each sample that the conversation makes: one, or one per trained turn when
        history had to be split.

        Raises RowError, naming file, row and message, for everything that can't be rendered beyond
        doubt, and the settings with which this row can be.
        """
        if history not in HISTORIES:
            raise ValueError(
                f"data.multiturn.history={history} is unknown: use {', '.join(HISTORIES)}."
            )
        try:
            return self.pieces_or_fault(conversation, history)
        except TemplateFault as error:
            raise with_ways_out(error, self, conversation, history) from error

    def pieces_or_fault(self, conversation: Conversation, history: str) -> list[list[Piece]]:
        """What `pieces` gives; its TemplateFault doesn't say what to do instead."""
        settled = settle_thoughts(conversation, self.drop_reasoning, self.reasoning_in_content)
        return cut_hidden(settled, self.controls, lambda hidden: self._pieces(hidden, history))

    def _pieces(self, conversation: Conversation, history: str) -> list[list[Piece]]:
        trained = _trained(conversation)
        turns = self._turns(conversation, trained)
        text = self._whole(conversation, turns)
        self._check_tools(conversation)
        rewritten = [turn for turn in turns if turn.message in trained and turn.place(text) is None]
        if not rewritten or history == "last":
            self._check_contexts(conversation, text, len(conversation.messages))
            return [cut(text, turns, trained)]
        if history == "error":
            raise fault(
                conversation,
                "the chat template shows this turn differently once later messages exist, so "
                "training the whole conversation would train what the model never sees",
                rewritten[0].message,
            )
        samples = [turn for turn in turns if turn.message in trained]
        for turn in samples:
            self._check_contexts(conversation, turn.whole, turn.message)
        return [cut(turn.whole, turns, {turn.message}) for turn in samples]

    def dropped_thoughts(self, conversation: Conversation) -> int:
        """How many trained turns lose what they think to `drop_reasoning`."""
        trained = [conversation.messages[i] for i in _trained(conversation)]
        return sum(bool(thoughts(message)) for message in trained) if self.drop_reasoning else 0

    def _turns(self, conversation: Conversation, trained: Collection[int]) -> list[Turn]:
        def show(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
            return self._conversation_text(conversation, messages, generation_prompt)

        return TurnFinder(conversation, show, self.ends, self._template.header).turns(trained)

    def _whole(self, conversation: Conversation, turns: Sequence[Turn]) -> str:
        """The text of the whole conversation: after a last turn of the assistant's, what inference
        shows before it.
        """
        last = len(conversation.messages) - 1
        if turns and turns[-1].message == last:
            return turns[-1].whole
        return self._conversation_text(conversation, conversation.messages, False)

    def _check_contexts(self, conversation: Conversation, text: str, end: int) -> None:
        turns = conversation.assistant_turns
        check_contexts(conversation, text, [i for i in range(end) if i not in turns])

    @property
    def source(self) -> str:
        """The text of the template; of several, all of it."""
        return str(self.template or self.tokenizer.chat_template)

    def _check_tools(self, conversation: Conversation) -> None:
        check_results(conversation, self.source)
        turns = conversation.assistant_turns
        opening = conversation.messages[: turns[0]] if turns else conversation.messages

        def show(tools: Sequence[Mapping[str, Any]] | None) -> str:
            return self.text(opening, tools, conversation.enable_thinking, True)

        check_tools(conversation, opening, show)

    # -- tokens
    # -------------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of pieces."""
        return Encoder(self.tokenizer, self.ends.known[0], self.controls)

    @cached_property
    def controls(self) -> Controls:
        """The control tokens, which data can't write."""
        source = self.template or self.tokenizer.chat_template
        template = source if isinstance(source, str) else json.dumps(source)
        return find_controls(
            self.tokenizer, template, structure_of(self.text, self.ends), self.ends.known, TAG
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of consecutive texts of the template's, each tokenised by itself; only the
        first begins the stream.
        """
        return self.encoder.encode([Piece(text) for text in texts])

    def tokenise(self, pieces: Sequence[Piece], checked: bool = False) -> Sample:
        """Tokens and mask of one sample.

        `checked`: ValueError, naming the message, unless what is trained decodes to its text.
        """
        ids = self.encoder.encode(pieces)
        for piece, part in zip(pieces, ids, strict=True):
            if piece.trained and (checked or piece.quoted or self.encoder.unknown in part):
                self.encoder.check(piece, part)
        mask = np.repeat([piece.trained for piece in pieces], [len(part) for part in ids])
        return Sample(np.concatenate([np.asarray(part, np.int32) for part in ids]), mask)

    def render(self, conversation: Conversation, history: str = "error") -> list[Sample]:
        """Tokens and masks of a conversation; what `pieces` says of samples and errors holds.

        Of one row in `ROWS_A_CHECK` it is checked that the trained tokens decode to the render: a
        tokenizer that fails, fails there.
        """
        checked = conversation.row % ROWS_A_CHECK == 0
        try:
            return [self.tokenise(pieces, checked) for pieces in self.pieces(conversation, history)]
        except RowError:
            raise
        except ValueError as error:
            raise conversation.error(str(error)) from error

    # -- rollout
    # ------------------------------------------------------------------------------------------------------

    def prompt_pieces(self, conversation: Conversation) -> list[Piece]:
        """The pieces of a prompt, generation prompt included. Raises RowError as `pieces` does."""
        return cut_hidden(
            conversation, self.controls, lambda hidden: [self._prompt_pieces(hidden)]
        )[0]

    def _prompt_pieces(self, conversation: Conversation) -> list[Piece]:
        turns = self._turns(conversation, ())
        text = self._conversation_text(conversation, conversation.messages, True)
        self._check_contexts(conversation, text, len(conversation.messages))
        self._check_tools(conversation)
        return cut(text, turns, ())

    def render_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Token ids of a prompt, generation prompt included: what a training sample has before its
        next assistant turn.

        Give the messages and tools of a checked `Conversation`. Raises RowError as `pieces` does.
        """
        prompt = Conversation(
            [*map(dict, messages)],
            [*map(dict, tools)] if tools else None,
            enable_thinking,
            "prompt",
        )
        return [token for ids in self.encoder.encode(self.prompt_pieces(prompt)) for token in ids]

    def render_tool_turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        responses: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        ended: bool = True,
        generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the glue after a sampled turn: tool (or user) messages and the next
        generation prompt.

        `messages` ends with the assistant's turn, whose text isn't looked at: sampled ids stay as
        they are. `ended` false: the turn was cut off before its end-of-turn token, which then comes
        first.
        """
        assert messages and messages[-1]["role"] == "assistant", (
            "the glue follows an assistant turn"
        )
        glue = self.glue.piece(
            messages, responses, Setting(tools, enable_thinking, ended, generation_prompt)
        )
        return self.encoder.encode([glue], begins=False)[0]

    @cached_property
    def glue(self) -> Glue:
        """What makes the text between turns."""
        framed = shows_contents_as_they_are(self.tokenizer, self.template, self.template_kwargs)
        return Glue(self.text, self.ends.known, self.controls, framed)

    # -- identity
    # ----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Changes whenever the tokens could: template, its arguments, tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = (
            backend.to_str()
            if backend is not None
            else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        )
        parts = [
            self.template or json.dumps(self.tokenizer.chat_template),
            json.dumps(self.template_kwargs, sort_keys=True, default=str),
        ]
        parts += [repr((self.drop_reasoning, self.reasoning_in_content))]
        parts += [
            json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            tokenizer,
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _trained(conversation: Conversation) -> list[int]:
    """The assistant's messages that aren't switched off."""
    return [i for i in conversation.assistant_turns if conversation.messages[i].get("loss_mask", 1)]
