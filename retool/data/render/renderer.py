"""The one renderer: every token that training, rollout and evaluation feed a model, and its mask.

What it is made of: `template.chat_template` (messages → text), `pieces` (text → pieces), `mask`
(which of them are trained), `tokens.encoder` (pieces → token ids), `between_turns` (what a rollout
puts after a sampled turn).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from retool.batch import Sample
from retool.data.read.chunk import RowError
from retool.data.read.rows import Conversation
from retool.data.render.between_turns import Glue, Setting
from retool.data.render.hide_control_tokens import structure_of
from retool.data.render.inline_outputs import OUTPUT
from retool.data.render.mask import mask_of, trained_messages
from retool.data.render.pieces import PieceMaker
from retool.data.render.rendering import Rendering
from retool.data.render.suggestions import with_ways_out
from retool.data.template.chat_template import ChatTemplate
from retool.data.template.choose import shows_contents_as_they_are
from retool.data.template.completeness import TemplateFault
from retool.data.template.dates import asks_for_date, fix_date, today
from retool.data.template.thoughts import TAG, is_left_open, thoughts
from retool.data.tokens.control_tokens import Controls, find_controls
from retool.data.tokens.encoder import Encoder, Piece

# Of one row in so many it is checked that its tokens decode to its text: decoding a row costs about
# a twentieth of making it.
ROWS_A_CHECK = 16
MOST_VARIANTS = 32  # of a renderer that are kept


def make_renderer(tokenizer: Any, rendering: Rendering) -> Renderer:
    """The renderer, with its template showing one day where it asks for the date.

    The template of `tokenizer` is changed then. Raises ValueError as `Renderer` does.
    """
    # Fixed once: a run that passes midnight would otherwise render its later rows with another
    # date.
    day = rendering.template_date or today()
    template = fix_date(tokenizer, rendering.chat_template, day)
    return Renderer(tokenizer, replace(rendering, chat_template=template))


class Renderer:
    """Renders conversations with a tokenizer, as `rendering` says.

    Can be pickled, so that worker processes share one. Raises ValueError where there is no
    template, or no end-of-turn token.
    """

    def __init__(self, tokenizer: Any, rendering: Rendering | None = None) -> None:
        self.tokenizer = tokenizer
        self.rendering = rendering or Rendering()
        self._template = ChatTemplate(
            tokenizer, self.rendering.chat_template, self.rendering.template_kwargs
        )
        self.template: str | None = self._template.source
        self.ends = self._template.ends
        self.variants: dict[str, Renderer] = {}  # made by `variant`
        self.refused: Counter[str] = Counter()  # rows of each kind of fault, see `suggestions`

    def variant(self, rendering: Rendering) -> Renderer:
        """A renderer with this tokenizer for another `rendering`; kept for the next call.

        Raises ValueError as the constructor does.
        """
        key = repr(rendering)
        made = self.variants.get(key)
        if made is None:
            now = self.rendering
            alike = replace(rendering, history=now.history, inline_outputs=now.inline_outputs)
            if alike == now:
                # Only the mask is another: what was learnt of template and tokenizer holds.
                made = copy.copy(self)
                made.rendering = rendering
            else:
                made = Renderer(self.tokenizer, rendering)
            # A server's clients may ask for any number of them
            for oldest in list(self.variants)[: -(MOST_VARIANTS - 1)]:
                self.variants.pop(oldest, None)
            self.variants[key] = made
        return made

    # -- text --

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The template's own text. Raises ValueError with what the template complains of."""
        return self._template.show(messages, tools, enable_thinking, generation_prompt)

    @property
    def source(self) -> str:
        """The text of the template; of several, all of it."""
        return str(self.template or self.tokenizer.chat_template)

    @property
    def shows_date(self) -> bool:
        """Whether the template asks for the date."""
        return asks_for_date(self.template or self.tokenizer.chat_template)

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn, for the sampler to stop at."""
        return tuple(int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.ends.known)

    @cached_property
    def reasoning(self) -> Literal["none", "tagged", "opened"]:
        """Whether the template knows <think> … </think>, and whether its prompt already opens it."""
        if "</think>" not in self.source:
            return "none"
        prompt = self.text([{"role": "user", "content": "Question"}], generation_prompt=True)
        return "opened" if prompt.rstrip().endswith("<think>") else "tagged"

    # -- pieces --

    @property
    def _maker(self) -> PieceMaker:
        return PieceMaker(
            self.text,
            self.source,
            self.ends,
            self._template.header,
            self.controls,
            self.rendering,
            self.local,
        )

    @cached_property
    def local(self) -> bool:
        """Whether the template is known to show each message by itself."""
        return shows_contents_as_they_are(
            self.tokenizer, self.template, self.rendering.template_kwargs
        )

    def pieces(self, conversation: Conversation) -> list[list[Piece]]:
        """The pieces of each sample: one, or one a trained turn when history had to be split.

        Raises RowError, naming file, row and message, for everything that can't be rendered beyond
        doubt, and the settings with which this row can be.
        """
        try:
            return self.pieces_or_fault(conversation)
        except TemplateFault as error:
            raise with_ways_out(error, self, conversation) from error

    def pieces_or_fault(self, conversation: Conversation) -> list[list[Piece]]:
        """What `pieces` gives; its TemplateFault doesn't say what to do instead."""
        return self._maker.of_samples(conversation)

    def prompt_pieces(self, conversation: Conversation) -> list[Piece]:
        """The pieces of a prompt, generation prompt included. Raises RowError as `pieces` does."""
        return self._maker.of_prompt(conversation)

    def dropped_thoughts(self, conversation: Conversation) -> int:
        """How many trained turns lose what they think to `drop_reasoning`."""
        if not self.rendering.drop_reasoning:
            return 0
        trained = [conversation.messages[i] for i in trained_messages(conversation)]
        return sum(bool(thoughts(message)) for message in trained)

    def open_thoughts(self, conversation: Conversation) -> list[int]:
        """The trained messages whose thought isn't closed."""
        messages = conversation.messages
        return [i for i in trained_messages(conversation) if is_left_open(messages[i])]

    def masked_outputs(self, conversation: Conversation) -> int:
        """How many outputs of programs amid trained turns `inline_outputs` leaves untrained."""
        if self.rendering.inline_outputs != "mask":
            return 0
        trained = [conversation.messages[i] for i in trained_messages(conversation)]
        return sum(len(OUTPUT.findall(message["content"])) for message in trained)

    # -- tokens --

    @cached_property
    def controls(self) -> Controls:
        """The control tokens, which data can't write."""
        source = self.template or self.tokenizer.chat_template
        template = source if isinstance(source, str) else json.dumps(source)
        structure = structure_of(self.text, self.ends)
        return find_controls(self.tokenizer, template, structure, self.ends.known, TAG)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of pieces."""
        return Encoder(self.tokenizer, self.ends.known[0], self.controls)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of consecutive texts of the template's, each tokenised by itself.

        Only the first begins the stream.
        """
        return self.encoder.encode([Piece(text) for text in texts])

    def tokenise(self, pieces: Sequence[Piece], checked: bool = False) -> Sample:
        """Tokens and mask of one sample.

        `checked`: ValueError, naming the message, unless what is trained decodes to its text.
        """
        ids = self.encoder.encode(pieces)
        for piece, part in zip(pieces, ids, strict=True):
            # Quoted control tokens and unknown ones are where tokenizers go wrong: those are always
            # checked.
            if piece.trained and (checked or piece.quoted or self.encoder.unknown in part):
                self.encoder.check(piece, part)
        tokens = np.concatenate([np.asarray(part, np.int32) for part in ids])
        return Sample(tokens, mask_of(pieces, ids))

    def render(self, conversation: Conversation) -> list[Sample]:
        """Tokens and masks of a conversation; what `pieces` says of samples and errors holds.

        In some rows (`ROWS_A_CHECK`) it is checked that the trained tokens decode to the text: a
        tokenizer that fails, fails there.
        """
        checked = conversation.row % ROWS_A_CHECK == 0
        try:
            return [self.tokenise(pieces, checked) for pieces in self.pieces(conversation)]
        except RowError:
            raise
        except ValueError as error:
            raise conversation.error(str(error)) from error

    # -- rollout --

    def render_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Token ids of a prompt, generation prompt included.

        They are what a training sample has before its next assistant turn. Give the messages and
        tools of a checked `Conversation`. Raises RowError as `pieces` does.
        """
        given_tools = [dict(tool) for tool in tools] if tools else None
        prompt = Conversation(
            [dict(message) for message in messages], given_tools, enable_thinking, "prompt"
        )
        ids = self.encoder.encode(self.prompt_pieces(prompt))
        return [token for part in ids for token in part]

    def render_tool_turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        responses: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        ended: bool = True,
        generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of what follows a sampled turn: `responses` and the next generation prompt.

        `messages` ends with the assistant's turn, whose text isn't looked at: sampled ids stay as
        they are. `ended` false: the turn was cut off before its end-of-turn token, which then comes
        first.
        """
        assert messages and messages[-1]["role"] == "assistant", "it follows an assistant turn"
        setting = Setting(tools, enable_thinking, ended, generation_prompt)
        glue = self.glue.piece(messages, responses, setting)
        return self.encoder.encode([glue], begins=False)[0]

    @cached_property
    def glue(self) -> Glue:
        """What makes the text between turns."""
        return Glue(self.text, self.ends.known, self.controls, self.local)

    # -- identity --

    def fingerprint(self) -> str:
        """Changes whenever the tokens could: template, its arguments, tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            tokenizer = backend.to_str()
        else:
            tokenizer = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        rendering = self.rendering
        # Every setting that may change a token. A token cache is named by it, so one that is left
        # out here would let an old cache pass.
        parts = [
            self.template or json.dumps(self.tokenizer.chat_template),
            json.dumps(dict(rendering.template_kwargs), sort_keys=True, default=str),
            repr((rendering.drop_reasoning, rendering.reasoning_in_content)),
            json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            tokenizer,
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
