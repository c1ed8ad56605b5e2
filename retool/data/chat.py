"""The one renderer: every token that training, rollout and evaluation feed a model, and which of them the model itself would write.

[Note: pieces] A conversation is rendered once, as text. The text is cut at the edges of the assistant's turns and every
piece is tokenised by itself, because that is how inference makes the stream: a prompt is tokenised, the model samples a
turn, the glue up to the next generation prompt is tokenised, and so on. A tokenizer run over the whole text could merge
across an edge (a turn that begins with a newline, after a generation prompt that ends with one) into a token that the
model can never be asked to produce.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..batch import Sample
from .accounting import TemplateFault, check_contexts, check_tools, fault
from .backend import encode_text, token_offsets
from .chat_template import ChatTemplate, valid_text
from .reasoning import settle_thoughts, thoughts
from .rows import Conversation
from .templates import load_tokenizer, other_tokens, shows_contents_as_they_are
from .turns import PLACEHOLDER, Piece, Turn, TurnFinder, cut
from .ways_out import with_ways_out

HISTORIES = ("error", "last", "split")
__all__ = ["HISTORIES", "Piece", "Renderer", "load_tokenizer", "other_tokens"]

HOLE = "AContentGoesHere"


class Renderer:
    """Renders conversations with a tokenizer and its chat template (or `chat_template`: `hermes` or a file).

    `template_kwargs` are passed to the template. `drop_reasoning` leaves out what assistants think, `reasoning_in_content`
    writes it as <think>…</think> at the beginning of the content. Raises ValueError where there is no template, or no
    end-of-turn token. Can be pickled, so that worker processes share one.
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
        self._frames: dict[tuple[Any, ...], list[str]] = {}
        self.variants: dict[str, Renderer] = {}  # made by `ways_out`

    # -- text ---------------------------------------------------------------------------------------------------------

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None, generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        """The template's own text. Raises ValueError with what the template (or Jinja) complains of."""
        return self._template.show(messages, tools, enable_thinking, generation_prompt)

    def _conversation_text(self, conversation: Conversation, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        try:
            return self.text(messages, conversation.tools, conversation.enable_thinking, generation_prompt)
        except ValueError as error:
            turn = len(messages) - 1 if len(messages) < len(conversation.messages) else None
            raise fault(conversation, str(error).removesuffix("."), turn) from error

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn, for the sampler to stop at."""
        return tuple(int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.ends.known)

    @cached_property
    def reasoning(self) -> Literal["none", "tagged", "opened"]:
        """Whether the template knows <think> … </think>, and whether its generation prompt already opens it."""
        if "</think>" not in str(self.template or self.tokenizer.chat_template):
            return "none"
        prompt = self.text([{"role": "user", "content": "Question"}], generation_prompt=True)
        return "opened" if prompt.rstrip().endswith("<think>") else "tagged"

    # -- pieces -------------------------------------------------------------------------------------------------------

    def pieces(self, conversation: Conversation, history: str = "error") -> list[list[Piece]]:
        """The pieces of each sample that the conversation makes: one, or one per trained turn when history had to be split.

        Raises RowError, naming file, row and message, for everything that can't be rendered beyond doubt, and the settings
        with which this row can be.
        """
        if history not in HISTORIES:
            raise ValueError(f"data.multiturn.history={history} is unknown: use {', '.join(HISTORIES)}.")
        try:
            return self.pieces_or_fault(conversation, history)
        except TemplateFault as error:
            raise with_ways_out(error, self, conversation, history) from error

    def pieces_or_fault(self, conversation: Conversation, history: str) -> list[list[Piece]]:
        """What `pieces` gives; its TemplateFault doesn't say what to do instead."""
        settled = settle_thoughts(conversation, self.drop_reasoning, self.reasoning_in_content)
        return self._pieces(settled, history)

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
                "the chat template shows this turn differently once later messages exist, so training the whole conversation"
                " would train what the model never sees",
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
        """The text of the whole conversation: after a last turn of the assistant's, what inference shows before it."""
        last = len(conversation.messages) - 1
        if turns and turns[-1].message == last:
            return turns[-1].whole
        return self._conversation_text(conversation, conversation.messages, False)

    def _check_contexts(self, conversation: Conversation, text: str, end: int) -> None:
        turns = conversation.assistant_turns
        check_contexts(conversation, text, [i for i in range(end) if i not in turns])

    def _check_tools(self, conversation: Conversation) -> None:
        turns = conversation.assistant_turns
        opening = conversation.messages[: turns[0]] if turns else conversation.messages

        def show(tools: Sequence[Mapping[str, Any]] | None) -> str:
            return self.text(opening, tools, conversation.enable_thinking, True)

        check_tools(conversation, opening, show)

    # -- tokens -------------------------------------------------------------------------------------------------------

    @cached_property
    def _anchor(self) -> str:
        """Put before a piece where the tokenizer would otherwise treat its beginning as that of a text (a dummy space)."""
        end = self.ends.known[0]
        plain, anchored = self.tokenizer(["a", end + "a"], add_special_tokens=False)["input_ids"]
        return end if plain != anchored[1:] else ""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of consecutive pieces of one text, each tokenised by itself; only the first begins the text."""
        if not texts:
            return []
        anchored = [texts[0], *(self._anchor + text for text in texts[1:])]
        ids = self.tokenizer(anchored, add_special_tokens=False, verbose=False)["input_ids"]
        return [ids[0], *(part[1:] for part in ids[1:])] if self._anchor else ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """(start, end) characters of each token of a piece, to show them; one stretch where the tokenizer can't tell."""
        return token_offsets(self.tokenizer, text) if self.tokenizer.is_fast else [(0, len(text))]

    def tokenise(self, pieces: Sequence[Piece]) -> Sample:
        """Tokens and mask of one sample."""
        ids = self.encode([piece.text for piece in pieces])
        mask = np.repeat([piece.trained for piece in pieces], [len(part) for part in ids])
        return Sample(np.concatenate([np.asarray(part, np.int32) for part in ids]), mask)

    def render(self, conversation: Conversation, history: str = "error") -> list[Sample]:
        """Tokens and masks of a conversation; what `pieces` says of samples and errors holds."""
        return [self.tokenise(pieces) for pieces in self.pieces(conversation, history)]

    # -- rollout ------------------------------------------------------------------------------------------------------

    def prompt_pieces(self, conversation: Conversation) -> list[Piece]:
        """The pieces of a prompt, generation prompt included. Raises RowError as `pieces` does."""
        turns = self._turns(conversation, ())
        text = self._conversation_text(conversation, conversation.messages, True)
        self._check_contexts(conversation, text, len(conversation.messages))
        self._check_tools(conversation)
        return cut(text, turns, ())

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, enable_thinking: bool | None = None
    ) -> list[int]:
        """Token ids of a prompt, generation prompt included: what a training sample has before its next assistant turn.

        Give the messages and tools of a checked `Conversation`. Raises RowError as `pieces` does.
        """
        prompt = Conversation([*map(dict, messages)], [*map(dict, tools)] if tools else None, enable_thinking, "prompt")
        return [token for ids in self.encode([piece.text for piece in self.prompt_pieces(prompt)]) for token in ids]

    def render_tool_turn(
        self, messages: Sequence[Mapping[str, Any]], responses: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None, enable_thinking: bool | None = None, ended: bool = True,
        generation_prompt: bool = True,
    ) -> list[int]:  # fmt: skip
        """Token ids of the glue after a sampled turn: tool (or user) messages and the next generation prompt.

        `messages` ends with the assistant's turn, whose text isn't looked at: sampled ids stay as they are. `ended` false:
        the turn was cut off before its end-of-turn token, which then comes first.
        """
        assert messages and messages[-1]["role"] == "assistant", "the glue follows an assistant turn"
        if self._framed and all(r["role"] in ("tool", "user") and type(r.get("content")) is str for r in responses):
            frame = self._frame(tuple(r["role"] for r in responses), enable_thinking, ended, generation_prompt)
            glue = valid_text(frame[0] + "".join(r["content"] + after for r, after in zip(responses, frame[1:], strict=True)))
        else:
            glue = self._glue(messages, responses, tools, enable_thinking, ended, generation_prompt)
        ids = encode_text(self.tokenizer, self._anchor + glue)
        return ids[1:] if self._anchor else ids

    def _glue(
        self, messages: Sequence[Mapping[str, Any]], responses: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None, enable_thinking: bool | None, ended: bool, generation_prompt: bool,
    ) -> str:  # fmt: skip
        """The text of the glue, from a render of everything."""
        placeholder = PLACEHOLDER
        while any(placeholder in str(message) for message in (*messages, *responses)):  # a tool may print anything
            placeholder += "X"
        stand_in = {"role": "assistant", "content": placeholder}
        text = self.text([*messages[:-1], stand_in, *responses], tools, enable_thinking, generation_prompt)
        glue = text.rpartition(placeholder)[2]
        end = next((token for token in self.ends.known if glue.lstrip().startswith(token)), None)
        if end is None:
            raise ValueError(f"the chat template follows an assistant turn with {glue[:30]!r}, not with {' or '.join(self.ends.known)}.")
        return glue[glue.index(end) + (len(end) if ended else 0) :]

    @cached_property
    def _framed(self) -> bool:
        return shows_contents_as_they_are(self.tokenizer, self.template, self.template_kwargs)

    def _frame(self, roles: tuple[str, ...], enable_thinking: bool | None, ended: bool, generation_prompt: bool) -> list[str]:
        """What the glue shows before, between and after the contents of messages with these roles."""
        key = (roles, enable_thinking, ended, generation_prompt)
        if key not in self._frames:
            holes = [{"role": role, "content": HOLE} for role in roles]
            self._frames[key] = self._glue([{"role": "assistant"}], holes, None, enable_thinking, ended, generation_prompt).split(HOLE)
        return self._frames[key]

    # -- identity ----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Changes whenever the tokens could: template, its arguments, tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = backend.to_str() if backend is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        parts = [self.template or json.dumps(self.tokenizer.chat_template), json.dumps(self.template_kwargs, sort_keys=True, default=str)]
        parts += [repr((self.drop_reasoning, self.reasoning_in_content))]
        parts += [json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str), tokenizer]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _trained(conversation: Conversation) -> list[int]:
    """The assistant's messages that aren't switched off."""
    return [i for i in conversation.assistant_turns if conversation.messages[i].get("loss_mask", 1)]
