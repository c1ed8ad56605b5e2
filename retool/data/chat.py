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
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import jinja2
import numpy as np

from ..batch import Sample
from .backend import encode_text, token_offsets
from .rows import SURROGATE, Conversation
from .templates import load_tokenizer, other_tokens, read_template, shows_contents_as_they_are
from .turns import EndOfTurn, Piece, Turn, check_contexts, check_tools, cut, find_turns

HISTORIES = ("error", "last", "split")
__all__ = ["HISTORIES", "Piece", "Renderer", "load_tokenizer", "other_tokens"]

PLACEHOLDER, HOLE = "TheTurnGoesHere", "AContentGoesHere"


class Renderer:
    """Renders conversations with a tokenizer and its chat template (or `chat_template`: `hermes` or a file).

    `template_kwargs` are passed to the template. Raises ValueError where there is no template, or no end-of-turn token.
    Can be pickled, so that worker processes share one.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = read_template(chat_template) if chat_template is not None else None
        self.template_kwargs = dict(template_kwargs or {})
        if self.template is None and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: choose one with data.chat_template=hermes, or a file.")
        self.ends = self._find_ends()
        self._frames: dict[tuple[Any, ...], list[str]] = {}

    # -- text ---------------------------------------------------------------------------------------------------------

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None, generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        """The template's own text. Raises ValueError with what the template (or Jinja) complains of."""
        kwargs = self.template_kwargs if enable_thinking is None else {**self.template_kwargs, "enable_thinking": enable_thinking}
        shown = [{key: value for key, value in message.items() if key != "loss_mask"} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                shown, tools=list(tools) if tools else None, chat_template=self.template,
                add_generation_prompt=generation_prompt, tokenize=False, **kwargs,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return _valid(text)

    def _conversation_text(self, conversation: Conversation, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        try:
            return self.text(messages, conversation.tools, conversation.enable_thinking, generation_prompt)
        except ValueError as error:
            raise conversation.error(str(error), len(messages) - 1 if len(messages) < len(conversation.messages) else None) from error

    def _find_ends(self) -> EndOfTurn:
        """The end-of-turn tokens: what the template writes after an answer, and the tokenizer's own."""
        added = frozenset(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip())
        probe = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": PLACEHOLDER}]
        before, _, tail = self.text(probe).rpartition(PLACEHOLDER)
        if not before:
            raise ValueError(
                "the chat template doesn't show an answer as it is written: use another (data.chat_template=hermes, or a file)."
            )
        known = max((token for token in added if tail.lstrip().startswith(token)), key=len, default=None)
        if known is None:
            raise ValueError(
                f"the chat template ends an answer with {tail[:30]!r}, which doesn't begin with a token of its own in this tokenizer:"
                " the model couldn't learn to stop. Use a template made for this tokenizer (data.chat_template), or add the token to it."
            )
        eos = self.tokenizer.eos_token
        return EndOfTurn(tuple(dict.fromkeys([known, *([eos] if eos in added else [])])), added)

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn, for the sampler to stop at."""
        return tuple(int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.ends.known)

    @cached_property
    def _has_generation_prompt(self) -> bool:
        messages = [{"role": "user", "content": "Question"}]
        return self.text(messages, generation_prompt=True) != self.text(messages)

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

        Raises RowError, naming file, row and message, for everything that can't be rendered beyond doubt.
        """
        if history not in HISTORIES:
            raise ValueError(f"data.multiturn.history={history} is unknown: use {', '.join(HISTORIES)}.")
        messages = conversation.messages
        turns = self._turns(conversation)
        text = self._conversation_text(conversation, messages, False)
        self._check(conversation, text)
        trained = [turn for turn in turns if messages[turn.message].get("loss_mask", 1)]
        rewritten = [turn for turn in trained if turn.place(text) is None]
        if not rewritten or history == "last":
            return [cut(text, turns, {turn.message for turn in trained})]
        if history == "split":
            wholes = {turn.message: turn.prompt + turn.body + turn.rest for turn in trained}
            return [cut(whole, turns, {message}) for message, whole in wholes.items()]
        raise conversation.error(
            "the chat template shows this turn differently once later messages exist, so training the whole conversation would"
            " train what the model never sees. Use"
            " data.multiturn.history=split (it makes a sample of every turn) or last (it trains only the turns that stay).",
            rewritten[0].message,
        )

    def _turns(self, conversation: Conversation) -> list[Turn]:
        def show(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
            return self._conversation_text(conversation, messages, generation_prompt)

        return find_turns(conversation, show, self.ends, self._has_generation_prompt)

    def _check(self, conversation: Conversation, text: str) -> None:
        turns = conversation.assistant_turns
        check_contexts(conversation, text, [i for i in range(len(conversation.messages)) if i not in turns])
        if conversation.tools:
            opening = conversation.messages[: turns[0]] if turns else conversation.messages
            bare = Conversation(list(opening), None, conversation.enable_thinking, conversation.file, conversation.row)
            check_tools(conversation, self._conversation_text(conversation, opening, False), self._conversation_text(bare, opening, False))

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
        turns = self._turns(conversation)
        text = self._conversation_text(conversation, conversation.messages, True)
        self._check(conversation, text)
        return cut(text, turns, set())

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
            glue = _valid(frame[0] + "".join(r["content"] + after for r, after in zip(responses, frame[1:], strict=True)))
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
        parts += [json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str), tokenizer]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _valid(text: str) -> str:
    if SURROGATE.search(text):
        raise ValueError("the text isn't valid Unicode (bytes that aren't UTF-8, or half of a surrogate pair).")
    return text
